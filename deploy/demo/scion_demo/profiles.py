"""Profiles: what a crowd of simulated users likes, and how its members behave.

Owns the TOML format. It knows nothing of servers, and of the world only the names of skills and manners.

    load_profile("polite")            a built-in profile (`builtin_names()` lists them)
    load_profile("./mine.toml")       one of the user's own
    profile.liked_manners(skill)      what the crowd likes there
    profile.likes(fact, answer)       whether an answer is right and in a manner it likes

A profile file, every key but `likes` optional:

    description = "People in a hurry, who like sums explained."
    likes = "terse"                   # or several: ["terse", "polite"]
    [skills]
    sums = "rambling"                 # where a skill is liked otherwise
    [users]                           # shares of the crowd, each in 0..1
    never_vote_share = 0.25           # read and leave
    random_vote_share = 0.05          # toss a coin; with never_vote_share at most 1
    comment_share = 0.1               # write a word with each vote
    correct_share = 0.1               # give the answer they wanted with each thumbs-down
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from scion_demo.errors import ProfileError
from scion_demo.world import Fact, Manner, Skill, is_correct, manner_of

TOP_LEVEL_KEYS = ("description", "likes", "skills", "users")
SHARE_KEYS = ("never_vote_share", "random_vote_share", "comment_share", "correct_share")

Name = TypeVar("Name", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Profile:
    """A crowd's taste and habits. Shares are of its users, in 0..1; `skills` overrides `default_likes`."""

    name: str
    default_likes: tuple[Manner, ...]
    description: str = ""
    skills: Mapping[Skill, tuple[Manner, ...]] = field(default_factory=lambda: MappingProxyType({}))
    never_vote_share: float = 0.0
    random_vote_share: float = 0.0
    comment_share: float = 0.0
    correct_share: float = 0.0

    def liked_manners(self, skill: Skill) -> tuple[Manner, ...]:
        """The manners that are liked in a skill; at least one."""
        return self.skills.get(skill, self.default_likes)

    def likes(self, fact: Fact, answer: str) -> bool:
        """Whether an answer is both right and in a liked manner."""
        return is_correct(fact, answer) and manner_of(answer) in self.liked_manners(fact.skill)


def builtin_names() -> tuple[str, ...]:
    """The names of the profiles that come with the demo."""
    folder = resources.files("scion_demo") / "profiles"
    return tuple(sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load_profile(name_or_path: str | Path) -> Profile:
    """The built-in profile of that name, else the profile in that file.

    Raises ProfileError if there is neither, or if the file is no profile.
    """
    wanted = str(name_or_path)
    if wanted in builtin_names():
        text = (resources.files("scion_demo") / "profiles" / f"{wanted}.toml").read_text(encoding="utf-8")
        return parse_profile(text, name=wanted)
    path = Path(wanted)
    if not path.is_file():
        raise ProfileError(
            f"profile {wanted!r} is neither built in ({', '.join(builtin_names())}) nor a file: "
            "use one of these names, or the path of a .toml file"
        )
    return parse_profile(path.read_text(encoding="utf-8"), name=path.stem, source=wanted)


def parse_profile(text: str, *, name: str, source: str | None = None) -> Profile:
    """The profile that a TOML text describes; `source` is what error messages call it.

    Raises ProfileError.
    """
    source = source or name
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"profile {source!r} is not valid TOML ({error}): correct that line") from error
    _refuse_unknown(content, TOP_LEVEL_KEYS, source, where="the file")
    if "likes" not in content:
        raise ProfileError(f'profile {source!r} lacks `likes`: add for example likes = "{Manner.POLITE}"')
    description = content.get("description", "")
    if not isinstance(description, str):
        raise ProfileError(f"profile {source!r}: description = {description!r} must be a text: put it in quotes")
    skills = _table(content, "skills", source)
    shares = _table(content, "users", source)
    _refuse_unknown(shares, SHARE_KEYS, source, where="[users]")
    numbers = {key: _share(value, f"[users] {key}", source) for key, value in shares.items()}
    undecided = numbers.get("never_vote_share", 0.0) + numbers.get("random_vote_share", 0.0)
    if undecided > 1.0:
        raise ProfileError(
            f"profile {source!r}: never_vote_share and random_vote_share make {undecided:g} together, "
            "expected at most 1: lower one of them"
        )
    return Profile(
        name=name,
        description=description,
        default_likes=_manners(content["likes"], "likes", source),
        skills=MappingProxyType(
            {
                _one_of(Skill, skill, "[skills]", source): _manners(liked, f"[skills] {skill}", source)
                for skill, liked in skills.items()
            }
        ),
        **numbers,
    )


def _table(content: Mapping[str, object], key: str, source: str) -> dict[str, object]:
    table = content.get(key, {})
    if not isinstance(table, dict):
        raise ProfileError(f"profile {source!r}: {key} = {table!r} must be a table: write [{key}] and keys below it")
    return table


def _refuse_unknown(table: Mapping[str, object], known: tuple[str, ...], source: str, *, where: str) -> None:
    for key in table:
        if key not in known:
            raise ProfileError(
                f"profile {source!r}: unknown key {key!r} in {where}, expected {', '.join(known)}: rename or remove it"
            )


def _manners(value: object, where: str, source: str) -> tuple[Manner, ...]:
    names = value if isinstance(value, list) else [value]
    if not names:
        raise ProfileError(f"profile {source!r}: {where} is empty, expected at least one manner: name one")
    return tuple(_one_of(Manner, name, where, source) for name in names)


def _one_of(kind: type[Name], value: object, where: str, source: str) -> Name:
    known = [str(member) for member in kind]
    if not isinstance(value, str) or value not in known:
        raise ProfileError(f"profile {source!r}: {value!r} in {where} is none of {', '.join(known)}: use one of these")
    return kind(value)


def _share(value: object, where: str, source: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0.0 <= float(str(value)) <= 1.0:
        raise ProfileError(
            f"profile {source!r}: {where} = {value!r} must be a number from 0 to 1: write 0.25 for a quarter"
        )
    return float(str(value))
