"""A Ray Serve application for one checkpoint, built by the Serve REST API:

    PUT /api/serve/applications/  {"applications": [{"name": ..., "route_prefix": ...,
        "import_path": "services.serving.app:build", "args": {"model_path": ..., "model_id": ...}}]}

It answers the OpenAI routes `/v1/models`, `/v1/chat/completions` and `/v1/completions` below its route prefix. The PUT is
declarative: an application that it leaves out is removed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, field_validator
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_openai_app

from sedsft.config import Config, Precision


class DeploymentArgs(Config):
    """What is served and on what."""

    model_path: Annotated[str, Field(min_length=1)]
    """A Hugging Face model folder with tokenizer and chat template."""
    model_id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")]
    """Value of `model` in requests."""
    dtype: Precision = "bf16"
    """Arithmetic of the engine."""
    max_model_len: Annotated[int, Field(ge=16)] | None = None
    """Longest prompt plus response, in tokens. Default: the model's own limit."""
    cpus: Annotated[float, Field(gt=0)] = 0.5
    """CPU cores reserved for the engine, with each GPU where it has several; its threads are this number, rounded down, at
    least 1."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs that the engine's layers are split over; 0 serves on CPU."""
    cpu_kv_cache_gb: PositiveInt = 1
    """Memory for keys and values on CPU, in GiB."""

    @field_validator("model_path")
    @classmethod
    def _is_a_model(cls, path: str) -> str:
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"expected a Hugging Face model folder, {path} has no config.json; give a checkpoint's folder")
        return path


class LocalModel(CallbackBase):
    """Tells Serve that the model is on this machine: without it one more process imports everything, only to find nothing
    to download."""

    async def on_before_node_init(self) -> None:
        """Called by Serve before it would download."""
        self.ctx.run_init_node = False


def llm_config(args: DeploymentArgs) -> LLMConfig:
    """Ray Serve's description of one engine with one replica."""
    threads = str(max(1, int(args.cpus)))
    env = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    engine: dict[str, Any] = {
        "dtype": "bfloat16" if args.dtype == "bf16" else "float32",
        "tensor_parallel_size": max(1, args.gpus),
    }
    if args.max_model_len is not None:
        engine["max_model_len"] = args.max_model_len
    if args.gpus == 0:
        # One process less, nothing compiled: half the start-up time and memory.
        env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
        # Prompts in one step: a request with a seed otherwise ends the engine, see services/rollout/engine.py.
        engine |= {"enforce_eager": True, "kv_cache_memory_bytes": args.cpu_kv_cache_gb << 30, "enable_chunked_prefill": False}
    bundle = {"CPU": args.cpus, "GPU": 1} if args.gpus else {"CPU": args.cpus}
    return LLMConfig(
        model_loading_config={"model_id": args.model_id, "model_source": args.model_path},
        engine_kwargs=engine,
        placement_group_config={"bundles": [bundle] * max(1, args.gpus)},
        deployment_config={"num_replicas": 1},
        runtime_env={"env_vars": env},
        callback_config={"callback_class": LocalModel},
    )


def build(args: dict[str, Any]) -> Application:
    """The application. Serve calls this with the `args` of the request; invalid ones end up in the application's message."""
    config = llm_config(DeploymentArgs.model_validate(args))
    # The HTTP side is light: a fraction of a core, so that a model can be served beside a job.
    ingress = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}}
    app: Application = build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress})
    return app
