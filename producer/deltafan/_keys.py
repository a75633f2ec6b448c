"""Every Redis key and channel name, made in one place."""

from dataclasses import dataclass

# arq's own key names. They are constants in arq, shared by all queues of a server and not ours to choose.
ARQ_JOB = "arq:job:"
ARQ_IN_PROGRESS = "arq:in-progress:"
ARQ_RESULT = "arq:result:"
ARQ_RETRY = "arq:retry:"
ARQ_ABORT = "arq:abort"

LANES = ("interactive", "batch")
"""The lanes, in the order in which a free worker looks at them."""

FAIR_LANE = "batch"
"""Where tenants take turns, however much each has waiting."""

FUNCTION = "deltafan.generate"
"""The arq function that every prompt job calls."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names under one prefix.

    The keys of a job carry the hash tag `{job_id}`, so they share a cluster slot and one script may touch them all.
    """

    prefix: str = "deltafan"

    def events(self, job_id: str) -> str:
        """Stream: the job's entries."""
        return f"{self.prefix}:{{{job_id}}}:events"

    def state(self, job_id: str) -> str:
        """Hash: status, attempt, run, cancel request, usage notes."""
        return f"{self.prefix}:{{{job_id}}}:state"

    def result(self, job_id: str) -> str:
        """String: the folded generation, JSON."""
        return f"{self.prefix}:{{{job_id}}}:result"

    def request(self, job_id: str) -> str:
        """String: the request of a job that may call tools, JSON; the next turn is made from it."""
        return f"{self.prefix}:{{{job_id}}}:request"

    def bell(self, job_id: str) -> str:
        """Channel: rung once per flush of the job's stream; a terminal ring carries the status."""
        return f"{self.prefix}:{{{job_id}}}:bell"

    def job(self, job_id: str) -> tuple[str, str, str]:
        """The three keys that the job scripts take, in their order: events, state, result."""
        return self.events(job_id), self.state(job_id), self.result(job_id)

    @property
    def usage(self) -> str:
        """Stream: the ledger, one usage record per model call."""
        return f"{self.prefix}:usage"

    def billed(self, job_id: str) -> str:
        """Set: the model calls of the job that are in the ledger already."""
        return f"{self.prefix}:billed:{job_id}"

    @property
    def cancels(self) -> str:
        """Channel: ids of jobs whose cancellation was just requested."""
        return f"{self.prefix}:cancels"

    def cooldown(self, provider: str, model: str) -> str:
        """String: while it lives, nobody calls this model of this provider, which has asked for less."""
        return f"{self.prefix}:cooldown:{provider}/{model}"

    @property
    def limits(self) -> str:
        """Start of the hashes of what providers and their models allow, and of what is used of it."""
        return f"{self.prefix}:limit:"

    @property
    def limited(self) -> str:
        """Set: names of providers and `provider/model` for which there is such a hash."""
        return f"{self.prefix}:limits"

    @staticmethod
    def lot(queue: str, name: str) -> str:
        """Sorted set: jobs of a queue that wait for the limits of `provider/model`."""
        return f"{queue}:lot:{name}"

    def batch(self, batch_id: str) -> str:
        """Hash: how far a batch is."""
        return f"{self.prefix}:batch:{batch_id}"

    @property
    def batches(self) -> str:
        """Sorted set: ids of batches by the unix time when they were last heard of."""
        return f"{self.prefix}:batches"

    @property
    def workers(self) -> str:
        """Sorted set: names of worker processes by the server's unix time when they last showed themselves."""
        return f"{self.prefix}:workers"

    def worker(self, name: str) -> str:
        """String: how busy a worker process is; it lives as long as the process shows itself."""
        return f"{self.prefix}:worker:{name}"

    @property
    def sweeper(self) -> str:
        """String: which process looks for jobs that a crash left to nobody."""
        return f"{self.prefix}:sweeper"

    def queue(self, lane: str) -> str:
        """Sorted set: arq's queue of one lane."""
        return f"{self.prefix}:queue:{lane}"

    @staticmethod
    def doorbell(queue: str) -> str:
        """List: tokens that wake one idle worker each."""
        return f"{queue}:bell"
