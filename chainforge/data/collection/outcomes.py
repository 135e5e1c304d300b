"""What comes of a request that brought no usable answer."""

from __future__ import annotations

from dataclasses import dataclass

from chainforge.core.errors import InputError
from chainforge.data.collection.intake import Intake
from chainforge.data.collection.jobs import Job, Jobs
from chainforge.data.collection.offline import OfflineTeacher
from chainforge.data.collection.replies import Failure, Rejected, Transient
from chainforge.data.collection.results import Results
from chainforge.data.datasets import FALLBACK

# So many in a row without one usable answer mean that something is wrong with all of them.
PATIENCE = 20


@dataclass
class Outcomes:
    """Record failures, and let the offline teacher stand in where that is wanted."""

    jobs: Jobs
    results: Results
    intake: Intake
    fallback: OfflineTeacher | None
    in_vain: int = 0  # answers in a row that were of no use

    def reject(self, job: Job, error: Rejected) -> InputError | None:
        """Record an answer that is of no use; ask once more for one that was cut off.

        Returns the error that ends the run when nothing that comes is of any use.
        """
        self.results.fault(error.kind, str(error))
        if error.too_short and not job.longer:
            job.longer = True
            self.jobs.back(job, 0.0)
            return None
        if job.longer and error.kind in ("status_400", "status_422"):
            error = Rejected("truncated", f"cut off, and a larger limit was refused: {error}")
        self.in_vain += 1
        self.lose(job, error, rejected=True)
        if self.in_vain < PATIENCE:
            return None
        return InputError(
            f"{PATIENCE} answers in a row were of no use, the last: {error} ({error.kind}); see "
            f"{self.results.failures_path}. Running again goes on from here"
        )

    def lose(self, job: Job, error: Failure, *, rejected: bool) -> None:
        """Record that there is no answer."""
        self.results.lose(job, error, rejected=rejected)
        if self.fallback is not None and not rejected:
            answer = self.fallback.answer(job.row, job.index)
            self.intake.arrive(job, {**answer, "source": FALLBACK, "request": job.key})
        else:
            self.jobs.done(job, None)

    def not_asked(self, job: Job) -> None:
        """Record that nobody was there to ask."""
        self.lose(job, Transient("not_asked", "not asked: the server was gone"), rejected=False)
