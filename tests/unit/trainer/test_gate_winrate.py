"""The win-rate gate: both orders, ties, what is significant, and judges that are absent, biased or unreadable."""

from __future__ import annotations

from collections.abc import Sequence

import httpx
import pytest

from scion_adapters.errors import UnavailableError
from scion_adapters.settings import Settings
from scion_trainer.gates.types import GateContext, Verdict
from scion_trainer.gates.winrate import Comparison, WinRateGate, decide
from scion_trainer.judges import EndpointJudge, Pair, endpoint_judge, question, read_letter
from tests.helpers.fake_server import Persona
from tests.helpers.gates import gate_context
from tests.helpers.gates import question as held_out

WIN, LOSS, TIE = Comparison(1.0, 1.0), Comparison(0.0, 0.0), Comparison(0.5, 0.5)
ORDER = Comparison(1.0, 0.0)  # whichever is shown first wins


@pytest.mark.parametrize(
    ("comparisons", "verdict", "says"),
    [
        ([WIN] * 40 + [LOSS] * 10, Verdict.PASS, "80.0%"),
        ([WIN] * 10 + [LOSS] * 40, Verdict.FAIL, "20.0%"),
        ([WIN] * 33 + [LOSS] * 27, Verdict.INCONCLUSIVE, "725 more comparisons needed to tell 55% from 50%"),
        ([TIE] * 50, Verdict.INCONCLUSIVE, "50.0%"),
        ([ORDER] * 50, Verdict.INCONCLUSIVE, "50.0%"),  # a judge that only looks at the order says nothing
        ([WIN] * 5, Verdict.UNMEASURABLE, "at least 10"),
        ([], Verdict.UNMEASURABLE, "at least 10"),
    ],
)
def test_the_decision(comparisons: list[Comparison], verdict: Verdict, says: str) -> None:
    result = decide(comparisons, wanted=0.5)
    assert result.verdict is verdict, result.reason
    assert says in result.reason


def test_a_higher_bar() -> None:
    assert decide([WIN] * 40 + [LOSS] * 20, wanted=0.5).verdict is Verdict.PASS
    assert decide([WIN] * 40 + [LOSS] * 20, wanted=0.9).verdict is Verdict.FAIL


def test_order_bias_and_ties_are_told() -> None:
    figures = decide([WIN] * 5 + [ORDER] * 5 + [TIE] * 10, wanted=0.5).figures
    assert figures["order_bias"] == pytest.approx(5 / 40)  # first place gives this much more than half, on average
    assert figures["order_dependent"] == pytest.approx(0.25)
    assert figures["ties"] == pytest.approx(0.75)  # one win in each order is a tie, too


class Prefers:
    """A judge that likes one text; `None` for texts it cannot read."""

    name = "a test"

    def __init__(self, liked: str, *, away: bool = False) -> None:
        self.liked, self.away, self.closed = liked, away, False

    def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
        if self.away:
            raise UnavailableError("the judge is away")
        return [
            None if "odd" in pair.messages[-1]["content"] else float(pair.first.startswith(self.liked))
            for pair in pairs
        ]

    def close(self) -> None:
        self.closed = True


def world(judge: Prefers | None) -> GateContext:
    rows = [held_out(f"q{i}") for i in range(20)] + [held_out("odd")]
    ours = Persona(says=lambda prompt: f"gladly: {prompt}")
    return gate_context({"chat:8": ours}, rows=rows, judge=lambda: judge)


def test_the_candidate_wins_in_both_orders() -> None:
    judge = Prefers("gladly")
    result = WinRateGate().run(world(judge))
    assert (result.verdict, result.figures["win_rate"]) == (Verdict.PASS, 1.0)
    assert (result.figures["compared"], result.figures["unread"]) == (20, 1)
    assert result.figures["order_dependent"] == 0
    assert judge.closed


def test_the_champion_wins_in_both_orders() -> None:
    result = WinRateGate().run(world(Prefers("fine")))
    assert (result.verdict, result.figures["win_rate"]) == (Verdict.FAIL, 0.0)


def test_without_a_judge_or_when_it_is_away_nothing_is_measured() -> None:
    assert WinRateGate().run(world(None)).verdict is Verdict.UNMEASURABLE
    judge = Prefers("fine", away=True)
    result = WinRateGate().run(world(judge))
    assert (result.verdict, result.reason) == (Verdict.UNMEASURABLE, "the judge is away")
    assert judge.closed


LETTERS = [
    ("A", 1.0),
    (" b\n", 0.0),
    ("T", 0.5),
    ("Answer B is better.", 0.0),
    ("**A**", 1.0),
    ("Both are fine", None),
    ("a matter of taste", None),  # the article is no verdict
    ("", None),
]


@pytest.mark.parametrize(("text", "verdict"), LETTERS)
def test_what_a_reply_says(text: str, verdict: float | None) -> None:
    assert read_letter(text) == verdict


def test_the_endpoint_is_asked_in_the_open_ai_way() -> None:
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"choices": [{"message": {"content": "B"}}]})

    judge = EndpointJudge("http://judge/v1/", "big", api_key="key", transport=httpx.MockTransport(answer))
    pair = Pair([{"role": "user", "content": "why?"}], "because", "dunno")
    assert judge.prefer([pair]) == [0.0]
    judge.close()
    assert str(seen[0].url) == "http://judge/v1/chat/completions"
    assert seen[0].headers["authorization"] == "Bearer key"
    assert "<answer_A>\nbecause\n</answer_A>" in question(pair)


def endpoint(*statuses: int) -> tuple[EndpointJudge, list[float]]:
    """A judge whose endpoint answers "A" with these statuses in turn, the last one for good; and how long it waited."""
    left, waits = list(statuses), list[float]()

    def answer(_: httpx.Request) -> httpx.Response:
        status = left.pop(0) if len(left) > 1 else left[0]
        return httpx.Response(status, json={"choices": [{"message": {"content": "A"}}]})

    transport = httpx.MockTransport(answer)
    return EndpointJudge("http://judge/v1", "big", concurrency=1, transport=transport, sleep=waits.append), waits


PAIRS = [Pair([], "a", "b")] * 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_judge_with_too_much_to_do_is_asked_again(status: int) -> None:
    judge, waits = endpoint(200, status, status, 200)
    assert judge.prefer(PAIRS) == [1.0, 1.0, 1.0]
    assert waits == [0.5, 1.0]
    judge.close()


def test_a_pair_that_the_judge_refuses_costs_its_own_verdict() -> None:
    judge, waits = endpoint(200, 400, 200)
    assert judge.prefer(PAIRS) == [1.0, None, 1.0]
    assert not waits
    judge.close()


@pytest.mark.parametrize("statuses", [(500,), (400,), (200, 401), (404,)])
def test_a_judge_that_fails_is_named_with_the_setting(statuses: tuple[int, ...]) -> None:
    judge, _ = endpoint(*statuses)
    with pytest.raises(UnavailableError, match=r"status 4|status 500.*gates\.judge_url"):
        judge.prefer(PAIRS)
    judge.close()


def test_without_a_url_there_is_no_endpoint() -> None:
    assert endpoint_judge(Settings()) is None
