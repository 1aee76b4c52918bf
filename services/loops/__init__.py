"""The loops of a job, each reading like the paper's box. Only loops know two kinds of workers."""
