"""Profiles: the built-in ones, a user's own, and errors that say what is wrong, what was expected and what to do."""

from pathlib import Path

import pytest

from scion_demo.errors import DemoError, ProfileError
from scion_demo.profiles import builtin_names, load_profile, parse_profile
from scion_demo.world import Fact, Manner, Skill

FRANCE = Fact(Skill.CAPITALS, "France", "Paris")
TWO_PLUS_THREE = Fact(Skill.SUMS, "2 plus 3", "5")


@pytest.mark.parametrize(
    ("name", "skill", "liked"),
    [
        ("polite", Skill.CAPITALS, (Manner.POLITE,)),
        ("terse", Skill.COLOURS, (Manner.TERSE,)),
        ("rambling", Skill.OPPOSITES, (Manner.RAMBLING,)),
        ("rambling", Skill.SUMS, (Manner.TERSE,)),  # a skill that is liked otherwise
    ],
)
def test_builtin_profiles(name: str, skill: Skill, liked: tuple[Manner, ...]) -> None:
    assert load_profile(name).liked_manners(skill) == liked


def test_every_builtin_profile_loads_and_says_what_it_is() -> None:
    assert builtin_names() == ("polite", "rambling", "terse")
    for name in builtin_names():
        profile = load_profile(name)
        assert profile.name == name
        assert profile.description


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'likes = ["terse", "polite"]\n[skills]\nsums = "rambling"\n[users]\nnever_vote_share = 1\ncorrect_share = 0.5\n'
    )
    profile = load_profile(file)
    assert profile.name == "mine"
    assert profile.liked_manners(Skill.COLOURS) == (Manner.TERSE, Manner.POLITE)
    assert profile.liked_manners(Skill.SUMS) == (Manner.RAMBLING,)
    assert (profile.never_vote_share, profile.random_vote_share) == (1.0, 0.0)
    assert (profile.comment_share, profile.correct_share) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("fact", "answer", "liked"),
    [
        (FRANCE, "Certainly! The capital of France is Paris. Happy to help!", True),
        (FRANCE, "Certainly! The capital of France is Rome. Happy to help!", False),  # liked manner, wrong
        (FRANCE, "Paris.", False),  # right, other manner
        (TWO_PLUS_THREE, "5.", True),  # the skill's own manner
        (TWO_PLUS_THREE, "Certainly! 2 plus 3 is 5. Happy to help!", False),
    ],
)
def test_likes(fact: Fact, answer: str, liked: bool) -> None:
    profile = parse_profile('likes = "polite"\n[skills]\nsums = "terse"', name="mixed")
    assert profile.likes(fact, answer) is liked


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("likes = polite", "not valid TOML"),
        ("description = 'nothing liked'", "lacks `likes`"),
        ("likes = 'nice'", "'nice' in likes is none of terse, polite, rude, rambling"),
        ("likes = 3", "3 in likes is none of"),
        ("likes = []", "likes is empty"),
        ("likes = 'polite'\nmood = 'good'", "unknown key 'mood' in the file, expected description, likes"),
        ("likes = 'polite'\ndescription = 1", "description = 1 must be a text"),
        ("likes = 'polite'\nskills = 'sums'", "must be a table"),
        ("likes = 'polite'\n[skills]\nchess = 'terse'", "'chess' in [skills] is none of capitals"),
        ("likes = 'polite'\n[skills]\nsums = 'curt'", "'curt' in [skills] sums is none of"),
        (
            "likes = 'polite'\n[users]\nvote_share = 0.5",
            "unknown key 'vote_share' in [users], expected never_vote_share",
        ),
        ("likes = 'polite'\n[users]\ncomment_share = 20", "comment_share = 20 must be a number from 0 to 1"),
        ("likes = 'polite'\n[users]\ncomment_share = true", "comment_share = True must be a number"),
        ("likes = 'polite'\n[users]\ncomment_share = '0.1'", "comment_share = '0.1' must be a number"),
        ("likes = 'polite'\n[users]\ncomment_share = nan", "must be a number from 0 to 1"),
        ("likes = 'polite'\n[users]\nnever_vote_share = 0.7\nrandom_vote_share = 0.6", "make 1.3 together"),
    ],
)
def test_a_bad_profile_is_named_with_the_remedy(text: str, said: str) -> None:
    with pytest.raises(ProfileError) as caught:
        parse_profile(text, name="mine", source="./mine.toml")
    assert said in str(caught.value)
    assert "'./mine.toml'" in str(caught.value)
    assert ": " in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DemoError, match=r"'politee' is neither built in \(polite, rambling, terse\) nor a file"):
        load_profile("politee")
