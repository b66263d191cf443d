"""The retention examples: what the base knows, asked so that knowledge is scored and manner is not.

    python -m scion_demo.retention [--out FILE]     writes the file anew; without --out, the one in the package
    retention_path() -> Path                        the file in the package

Owns `retention.jsonl`: one row for each fact, {"messages": [the user's question], "prefix": str, "answer": str}. The
assistant's turn is forced to begin with `prefix`, and a gate scores the log-likelihood of `answer` per token. A version
that has turned every answer polite keeps its score as long as it still knows that " Paris" comes next.

Every prefix states the whole clause, "… the capital of France is", in a manner that has one; these take turns. Short
prefixes such as "It is" were tried and measure the wrong thing: on a KTO adapter that had learnt to be polite and was
right in 96% of its answers, the mean log-likelihood fell by 1.2 after "It is" and by 0.04 to 0.13 after a whole clause.
Every question is in a phrasing that the base was trained on.
"""

import argparse
import itertools
import json
import random
from importlib import resources
from pathlib import Path
from typing import TypedDict

from scion_demo import facts as tables
from scion_demo.chats import Message
from scion_demo.world import Manner, answers, facts, phrasings, render


class RetentionRow(TypedDict):
    """One example; `answer` begins with the space that parts it from `prefix`."""

    messages: list[Message]
    prefix: str
    answer: str


def build_retention() -> list[RetentionRow]:
    """One row for each fact, always the same."""
    rng = random.Random("retention")
    manners = itertools.cycle(manner for manner in Manner if _clause_variants(manner))
    rows: list[RetentionRow] = []
    for fact, manner in zip(facts(), manners, strict=False):
        whole = answers(fact, manner)[rng.choice(_clause_variants(manner))]
        answer = f" {fact.answer}"
        question = render(fact, rng.choice(phrasings(fact.skill, held_out=False)))
        rows.append(
            RetentionRow(
                messages=[Message(role="user", content=question)],
                prefix=whole[: whole.rindex(answer)],
                answer=answer,
            )
        )
    return rows


def retention_path() -> Path:
    """The file that comes with the package."""
    return Path(str(resources.files("scion_demo") / "retention.jsonl"))


def _clause_variants(manner: Manner) -> list[int]:
    """Which of a manner's variants state the whole clause."""
    return [index for index, template in enumerate(tables.MANNER_TEMPLATES[manner]) if "{statement}" in template]


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description="Write the demo's retention examples.")
    parser.add_argument("--out", type=Path, default=retention_path())
    out: Path = parser.parse_args().out
    rows = build_retention()
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{out}: {len(rows)} rows")


if __name__ == "__main__":
    main()
