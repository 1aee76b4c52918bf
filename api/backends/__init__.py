"""Where runs are launched: one interface, an implementation per kind of cluster."""
