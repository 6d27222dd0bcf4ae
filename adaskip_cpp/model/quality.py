"""What a plan changes in answers: the figures of a :class:`Quality` and of :class:`Passkeys`."""

import math
from dataclasses import dataclass

from ..errors import PlanError
from ..intervals import Interval

ERRORS = 1.6  # standard errors that are added to a mean loss before it is compared with a promise


@dataclass(frozen=True)
class Passkeys:
    """Pass keys that were found.

    Attributes:
        n: number of pass keys: each prompt hides three numbers and three names.
        whole: pass keys that the whole model finds clearly: it prefers each token to any other by a factor of 10.
        plan: those of them that the plan finds.
    """

    n: int
    whole: int
    plan: int

    def __post_init__(self) -> None:
        if not 0 <= self.plan <= self.whole <= self.n:
            raise PlanError(f"{self.plan} of {self.whole} of {self.n} pass keys are impossible; tune again")


@dataclass(frozen=True)
class Quality:
    """The quality of one kind of answers, against the whole model: means over texts, with 95% intervals.

    Attributes:
        divergence: divergence from the whole model, in nats per token. Tokens of pass keys that become likelier have 0.
        error: standard error of the divergence.
        loss: added loss, in nats per token.
        excess: lower end of the 95% interval of loss minus divergence, in nats per token, or 0 if that is negative.
        agreement: share of tokens for which both find the same token likeliest.
        tails: 99% and 99.9% quantile of the divergence over all tokens.
        n_texts: number of judged texts.
        n_tokens: number of judged tokens.
    """

    divergence: Interval
    error: float
    loss: Interval
    excess: float
    agreement: Interval
    tails: tuple[float, float]
    n_texts: int
    n_tokens: int

    def __post_init__(self) -> None:
        if self.divergence.value < 0 or self.error < 0 or self.excess < 0:
            raise PlanError("a divergence is negative, which is impossible; tune again")

    @property
    def harm(self) -> float:
        """The expected loss, in nats per token: divergence and excess.

        The mean added loss of a few texts is mostly chance. If the whole model is right, its expectation is the
        divergence, which varies much less.
        """
        return self.divergence.value + self.excess

    @property
    def needs(self) -> float:
        """The smallest promise that is kept, in nats per token: the mean added loss must keep it too."""
        return max(self.needs_by_divergence, self.loss.value)

    @property
    def needs_by_divergence(self) -> float:
        """``needs`` without the mean added loss: harm plus 1.6 standard errors. It is infinite for one text.

        On four texts, the mean divergence alone would break a promise in 4 of 20 choices, with one error in 1.5, with
        1.6 in 1.
        """
        return math.inf if math.isnan(self.error) else self.harm + ERRORS * self.error
