"""What comes of a request that brought no usable answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from chainforge.core.errors import InputError
from chainforge.data.datasets import FALLBACK
from chainforge.generate.intake import Intake
from chainforge.generate.jobs import Job, Jobs
from chainforge.generate.offline import OfflineTeacher
from chainforge.generate.replies import Failure, Refused, Rejected, Transient
from chainforge.generate.results import Results

# So many in a row without one usable answer mean that something is wrong with all of them.
PATIENCE = 20
# So often is a prompt asked whose reply the server begins, and breaks off.
MOST_BILLED = 3


@dataclass
class Outcomes:
    """Record failures, and let the offline teacher stand in where that is wanted."""

    jobs: Jobs
    results: Results
    intake: Intake
    fallback: OfflineTeacher | None
    in_vain: int = 0  # answers in a row that were of no use
    heard: bool = False  # whether the server has answered a request in this run
    # Whether these are the rows' fault shows once the server answers another request.
    refused: list[tuple[Job, Refused]] = field(default_factory=list)

    def answered(self) -> None:
        """Note that the server answers requests: what it refused is the fault of those rows."""
        self.heard = True
        self.settle()

    def settle(self) -> InputError | None:
        """Record what the server refused; return the error where it has answered nothing at all.

        Then the settings are at fault, and no row is given up.
        """
        heard, refused = self.heard or bool(self.results.kept), self.refused
        self.refused = []
        for job, error in refused:
            self.results.lose(job, error, rejected=heard)
        if heard or not refused:
            return None
        return InputError(f"the server refused every request: {refused[-1][1]}")

    def reject(self, job: Job, error: Rejected) -> InputError | None:
        """Record an answer that is of no use; ask once more for one that was cut off.

        Returns the error that ends the run when nothing that comes is of any use.
        """
        self.results.fault(error.kind, str(error))
        if error.too_short and not job.longer:
            job.longer = True
            self.jobs.back(job, 0.0)
            return None
        self.in_vain += 1
        if not isinstance(error, Refused):
            self.lose(job, error, rejected=True)
        elif job.longer:
            words = f"cut off, and a larger limit was refused: {error}"
            self.lose(job, Rejected("truncated", words), rejected=True)
        else:
            self.refused.append((job, error))
            self.jobs.done(job, None)
        if self.in_vain < PATIENCE:
            return None
        if self.refused and (refusal := self.settle()):
            return refusal
        return InputError(
            f"{PATIENCE} answers in a row were of no use. {self.results.last_words()} "
            "Run the same command again to continue"
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
