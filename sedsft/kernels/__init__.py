"""Row functions that visit a chunk of logits as few times as the arithmetic allows."""
