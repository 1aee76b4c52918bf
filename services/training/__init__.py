"""DeepSpeed trainers as Ray actors: one for supervised fine-tuning, one for the policy."""
