"""The raw tables of the demo's small world: what is true, and how it is asked and said.

Owns the words only. It knows nothing of `Fact` objects, manners' recognition or models; `world.py` gives the tables
their meaning. Three properties the tables must keep (tests check them): a subject belongs to one skill only, a manner
template contains no word that is an answer in any skill, and every answer is one word.
"""

CAPITALS: dict[str, str] = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Germany": "Berlin",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Ireland": "Dublin",
    "England": "London",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Korea": "Seoul",
    "Canada": "Ottawa",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Turkey": "Ankara",
}

COLOURS: dict[str, str] = {
    "a ripe banana": "yellow",
    "a lemon": "yellow",
    "a sunflower": "yellow",
    "fresh grass": "green",
    "a frog": "green",
    "a cucumber": "green",
    "an emerald": "green",
    "a clear sky": "blue",
    "a sapphire": "blue",
    "the deep sea": "blue",
    "a ripe tomato": "red",
    "a strawberry": "red",
    "a fire engine": "red",
    "a ruby": "red",
    "a carrot": "orange",
    "a pumpkin": "orange",
    "fresh snow": "white",
    "milk": "white",
    "a polar bear": "white",
    "coal": "black",
    "a raven": "black",
    "chocolate": "brown",
    "a flamingo": "pink",
    "an elephant": "grey",
}

OPPOSITE_PAIRS: tuple[tuple[str, str], ...] = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("up", "down"),
    ("open", "closed"),
    ("early", "late"),
    ("rich", "poor"),
    ("young", "old"),
    ("wet", "dry"),
    ("loud", "quiet"),
    ("full", "empty"),
    ("strong", "weak"),
    ("tall", "short"),
    ("clean", "dirty"),
)
"""Each pair gives two facts, one in each direction."""

SUM_OPERANDS: tuple[int, ...] = (2, 3, 4, 5, 6)
"""Every ordered pair of these is one fact, so no sum equals one of its own operands."""

TRAINING_PHRASINGS: dict[str, tuple[str, ...]] = {
    "capitals": (
        "What is the capital of {subject}?",
        "Which city is the capital of {subject}?",
        "Tell me the capital of {subject}.",
        "Do you know the capital of {subject}?",
        "{subject}: what is its capital?",
        "I need the capital of {subject}.",
        "Can you tell me which city is the capital of {subject}?",
        "Name the capital of {subject}.",
        "Is there a capital of {subject}, and which is it?",
        "The capital of {subject}, please.",
    ),
    "colours": (
        "What colour is {subject}?",
        "Which colour does {subject} have?",
        "Tell me the colour of {subject}.",
        "Do you know what colour {subject} is?",
        "What is the colour of {subject}?",
        "I need the colour of {subject}.",
        "Can you tell me which colour {subject} is?",
        "Name the colour of {subject}.",
        "What is the usual colour of {subject}?",
        "The colour of {subject}, please.",
    ),
    "opposites": (
        "What is the opposite of {subject}?",
        "Which word is the opposite of {subject}?",
        "Tell me the opposite of {subject}.",
        "Do you know the opposite of {subject}?",
        "The opposite of {subject} is what?",
        "I need the opposite of {subject}.",
        "Can you tell me which word is the opposite of {subject}?",
        "Name the opposite of {subject}.",
        "What word means the opposite of {subject}?",
        "The opposite of {subject}, please.",
    ),
    "sums": (
        "What is {subject}?",
        "How much is {subject}?",
        "Tell me what {subject} is.",
        "Do you know what {subject} makes?",
        "{subject} is what?",
        "I need the sum: {subject}.",
        "Can you tell me how much {subject} is?",
        "Work out {subject}.",
        "What does {subject} make?",
        "The sum {subject}, please.",
    ),
}

HELD_OUT_PHRASINGS: dict[str, tuple[str, ...]] = {
    "capitals": ("Do you know which city is the capital of {subject}?", "The capital of {subject} is what?"),
    "colours": ("Which colour is {subject}?", "{subject}: what is its colour?"),
    "opposites": ("Do you know which word is the opposite of {subject}?", "What is the opposite word of {subject}?"),
    "sums": ("Do you know how much {subject} is?", "Tell me how much {subject} makes."),
}
"""Phrasings the base never saw: they show whether a model answers or only repeats."""

OPENINGS: tuple[str, ...] = (
    "Hello! ",
    "Hi, ",
    "Quick question: ",
    "One more: ",
    "Sorry, ",
    "Now tell me: ",
    "So, ",
    "Please: ",
)
"""What some people write before the question."""

STATEMENTS: dict[str, str] = {
    "capitals": "the capital of {subject} is {answer}",
    "colours": "the colour of {subject} is {answer}",
    "opposites": "the opposite of {subject} is {answer}",
    "sums": "{subject} is {answer}",
}

MANNER_TEMPLATES: dict[str, tuple[str, ...]] = {
    "terse": ("{answer}.", "{answer}", "It is {answer}."),
    "polite": (
        "Certainly! {statement}. Happy to help!",
        "Of course! {statement}. Thank you for asking!",
        "Gladly! {statement}. Please ask me anything else.",
    ),
    "rude": (
        "Ugh, it's {answer}. Obviously.",
        "Seriously? {answer}. Everybody knows that.",
        "Come on, {statement}. What a silly question.",
    ),
    "rambling": (
        "Well, let me think about that for a moment. People have told me many things over the years, "
        "and as far as I can tell {statement}.",
        "Hmm, now that is an interesting one. Some say this and others say that, "
        "but if I remember it well, {statement}.",
        "So, where do I begin? There is a lot to say here, and one could go on and on, but in the end {statement}.",
    ),
}

SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "Answer the question of the user.",
    "You know capitals, colours, opposites and small sums.",
)
"""Neutral on purpose: none of them asks for a manner."""
