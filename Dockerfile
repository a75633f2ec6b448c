# The worker's image: dependencies pinned by hash, then our own wheel, run without root's rights.
FROM python:3.13-slim AS build
WORKDIR /src
RUN python -m venv /opt/deltafan
ENV PATH=/opt/deltafan/bin:$PATH
# Before the sources, so that a change of ours does not install all dependencies again.
COPY requirements/worker.txt requirements/
RUN pip install --no-cache-dir --require-hashes -r requirements/worker.txt
COPY . .
RUN pip wheel --no-deps --no-build-isolation --wheel-dir dist . && pip install --no-cache-dir --no-deps dist/*.whl

FROM python:3.13-slim
RUN useradd --uid 10001 --no-create-home deltafan
COPY --from=build /opt/deltafan /opt/deltafan
ENV PATH=/opt/deltafan/bin:$PATH PYTHONUNBUFFERED=1
USER deltafan
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s CMD ["deltafan", "worker", "--check"]
ENTRYPOINT ["deltafan"]
CMD ["worker"]
