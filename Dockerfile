# The worker's image: dependencies pinned by hash, then the wheel, run by nobody in particular.
FROM python:3.13-slim AS build
WORKDIR /src
COPY requirements/worker.txt requirements/worker.txt
RUN python -m venv /opt/deltafan && /opt/deltafan/bin/pip install --no-cache-dir --require-hashes -r requirements/worker.txt
COPY . .
RUN /opt/deltafan/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.13-slim
RUN useradd --system --uid 10001 deltafan
COPY --from=build /opt/deltafan /opt/deltafan
ENV PATH=/opt/deltafan/bin:$PATH PYTHONUNBUFFERED=1
USER deltafan
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s CMD ["deltafan", "worker", "--check"]
ENTRYPOINT ["deltafan"]
CMD ["worker"]
