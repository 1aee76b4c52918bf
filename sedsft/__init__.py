"""The algorithm library of sedsft: tensors in, tensors out.

Nothing is imported here, so that `sedsft.config` can validate a job in a process without torch.
"""
