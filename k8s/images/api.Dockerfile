# The API without torch or Ray: it speaks to Ray over HTTP.
#     docker build -f k8s/images/api.Dockerfile -t sedsft-api:0.1.0 .
# The worker image starts from the same base: a driver is started with the path of this image's Python.
FROM python:3.11-slim AS build
WORKDIR /src
COPY requirements/cpu.txt requirements/cpu.txt
RUN pip install --no-cache-dir --no-deps "$(grep '^setuptools==' requirements/cpu.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY sedsft sedsft
COPY services services
COPY api api
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.11-slim
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY requirements/cpu.txt /tmp/lock.txt
# What api.app imports and what that needs, at the locked versions; `pip check` fails the build when one is missing.
RUN grep -E "^(alembic|annotated-doc|annotated-types|anyio|certifi|click|fastapi|filelock|fsspec|h11|hf-xet|httpcore|httpcore2|httpx|httpx2\
|huggingface-hub|idna|mako|markupsafe|numpy|packaging|pyarrow|pydantic|pydantic-core|pydantic-settings|python-dotenv|pyyaml|sqlalchemy\
|starlette|tqdm|truststore|typing-extensions|typing-inspection|uvicorn)==" \
        /tmp/lock.txt > /tmp/api.txt \
    && pip install --no-cache-dir --no-deps -r /tmp/api.txt
COPY --from=build /wheels /tmp/wheels
RUN pip install --no-cache-dir --no-deps /tmp/wheels/*.whl \
    && pip check \
    && python -c "import api.app" \
    && rm -r /tmp/wheels /tmp/lock.txt /tmp/api.txt \
    && useradd --uid 10001 --user-group --create-home sedsft
USER 10001:10001
WORKDIR /home/sedsft
EXPOSE 8642
CMD ["python", "-m", "api.app"]
