"""Jobs: endpoints -> service -> store."""
