"""Rollout workers: vLLM engines in Ray actors, the fleet that the driver holds, and verified weight sync.

vLLM is imported by `engine` and `worker_extension` only, which are loaded in the actors; `fleet`, `worker` and `weight_sync`
are safe to import in the driver.
"""
