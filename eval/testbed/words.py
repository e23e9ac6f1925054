# ruff: noqa: SIM905 (word lists read better as text)
"""The closed vocabularies that the testbed's inputs are drawn from."""

from __future__ import annotations

from random import Random

# Everyday nouns of 3 to 7 letters. Every one holds a vowel and a consonant. None but "mirror" is an instruction word.
WORDS: tuple[str, ...] = tuple(
    """
    acorn actor album almond amber anchor angel ankle apple apron arrow artist atlas attic autumn axe
    badge bagel baker balloon bamboo banana banjo barrel basil basket beach bead bean bear beaver bed bee beetle
    bell bench berry bike biscuit blanket boat bonnet boot bottle bowl brass bread breeze brick bridge brook
    broom brush bucket buffalo bugle bundle butter button
    cabin cactus cake camel candle canoe canvas canyon captain carpet carrot castle cat cave cedar cello chair
    cheese cherry chess chicken circus clay cloud clover coat cobra coconut coffee comet compass copper coral
    cotton cousin cow crab cradle cricket crown cup curtain cushion
    daisy dawn deer desert desk diamond dinner dog dolphin donkey dragon drum duck dune
    eagle earth easel elbow elk ember emerald engine
    falcon farm farmer feather fern fiddle field fig finger fire fish flame flute foam forest fork fossil fox frog
    fruit galaxy garden garlic ginger giraffe glacier glove goat gold goose gorilla grape grass gravel guitar
    hammer harbour harp hat hawk hazel hedge helmet hen heron hill honey hornet horse hotel
    iceberg igloo insect iron island ivory jacket jaguar jar jasmine jelly jewel jungle juniper
    kayak kennel kettle kitchen kite kitten koala ladder lagoon lake lamp lantern lark laser lava leaf lemon leopard
    lilac lily lime linen lion lizard lobster locket lotus lunch
    magnet mango mantle maple marble market meadow melon mercury meteor milk mirror mitten monkey moon moose
    morning moth muffin museum mustard napkin nectar needle nest noodle nurse nutmeg
    oak oasis ocean octopus olive onion opera orange orbit orchard orchid otter oven owl oyster
    paddle palace panda panther paper parade parrot peach peacock peanut pear pebble pencil penguin pepper piano
    picnic pigeon pillow pilot pine pirate pizza planet plum pocket pond pony poppy potato prairie prince pumpkin
    puppet puzzle quarry quartz quilt rabbit raccoon radio raft rain raisin ranch raven ribbon rice river road
    robin robot rocket roof rope rose ruby saddle salad salmon salt sand scarf school scooter seal shadow shark
    sheep shell shield ship silk silver sister snail snake snow soap sock sofa soup spider spoon squid stone storm
    stream sugar summer sun swan table tailor teapot temple tennis tent thunder ticket tiger timber toast tomato
    torch towel tower tractor train treasure trumpet tulip tundra tunnel turnip turtle umber uncle unicorn valley
    vanilla velvet village violet violin volcano wagon walnut walrus water wave weasel whale wheat wheel whistle
    willow window winter wizard wolf yacht yoghurt zebra zinc
    """.split()
)

# Words whose plural is worth looking up, with it: irregular ones and the main spelling rules.
PLURALS: dict[str, str] = {
    "child": "children", "foot": "feet", "tooth": "teeth", "mouse": "mice", "man": "men", "woman": "women",
    "person": "people", "ox": "oxen", "goose": "geese", "leaf": "leaves", "knife": "knives", "life": "lives",
    "wolf": "wolves", "half": "halves", "loaf": "loaves", "wife": "wives", "thief": "thieves", "shelf": "shelves",
    "box": "boxes", "bus": "buses", "glass": "glasses", "dish": "dishes", "watch": "watches", "fox": "foxes",
    "city": "cities", "baby": "babies", "lady": "ladies", "story": "stories", "party": "parties", "fly": "flies",
    "potato": "potatoes", "tomato": "tomatoes", "hero": "heroes", "echo": "echoes", "louse": "lice",
    "cactus": "cacti", "die": "dice", "calf": "calves", "scarf": "scarves", "elf": "elves",
}  # fmt: skip

CAPITALS: dict[str, str] = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Poland": "Warsaw",
    "Greece": "Athens", "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Egypt": "Cairo",
    "Kenya": "Nairobi", "Peru": "Lima", "Chile": "Santiago", "Cuba": "Havana", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Iceland": "Reykjavik",
    "Ireland": "Dublin", "Portugal": "Lisbon", "Austria": "Vienna", "Hungary": "Budapest", "Russia": "Moscow",
    "Turkey": "Ankara", "Canada": "Ottawa", "Brazil": "Brasilia", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Belgium": "Brussels",
}  # fmt: skip

OPPOSITES: dict[str, str] = {
    "hot": "cold", "big": "small", "happy": "sad", "early": "late", "young": "old", "fast": "slow",
    "hard": "soft", "light": "dark", "rich": "poor", "full": "empty", "open": "closed", "wet": "dry",
    "high": "low", "strong": "weak", "loud": "quiet", "thick": "thin", "clean": "dirty", "brave": "afraid",
    "sweet": "sour", "wide": "narrow", "deep": "shallow", "near": "far", "true": "false",
    "day": "night", "win": "lose", "push": "pull", "buy": "sell", "love": "hate",
    "smooth": "rough", "cheap": "dear", "safe": "risky",
}  # fmt: skip

MONTHS: tuple[str, ...] = tuple(
    "January February March April May June July August September October November December".split()
)

KEYS: tuple[str, ...] = tuple(
    "colour name city size shape title owner animal fruit street team level mode type brand model".split()
)

# Ordinary English around an input: lets the base learn to find the input whatever words stand beside it.
FILLER: tuple[str, ...] = tuple(
    """
    a about after again all also an and answer any are as ask at back be because before below but by can case change
    check come could do does each else every example find first follow following for form from get give given go
    good great have hello help here hey hi how i idea if in input instead into is it item job just keep kindly know
    last let like line list little look made make many matter may me mean might mine more most must my need new next
    nice no not note now of off ok on once one only or other our out over own part phrase place please problem
    put question quick quickly read ready result return right same say see send set should show simple so some
    something still string such take task tell term text than thank thanks that the their them then there these
    they thing think this time to today too try turn two up us use very want was way we well what when where
    which while who will wish with without wonder word would write year yes you your
    alphabet alphabetical antonym appear arabic ascending away back backwards bigger build calculate capital capitals
    change cipher code combine compute consonant consonants contain contrary convert count country date deliver
    digit digits encode expect extract figure flip flipped format government greater highest initial initials
    key larger latin leave letter letters lower maximum mirror mirrored national notation number numbers numeral
    numerals object opposite order ordered organise output pair parse pick pig plain plural produce provide
    rearrange remove render represent reverse reversed roman row seat several shift shifted single sort
    sorted spell spelling standard style sum swap syntax together total transform translate upper uppercase value
    vowel vowels words yield zero
    """.split()
)


def held_out(word: str) -> bool:
    """Whether a word is kept for the test prompts: every fourth, spread over the alphabet."""
    return WORDS.index(word) % 4 == 1


TRAIN_WORDS: tuple[str, ...] = tuple(w for w in WORDS if not held_out(w))
TEST_WORDS: tuple[str, ...] = tuple(w for w in WORDS if held_out(w) and len(w) <= 6)

_ONSETS = tuple("b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl gr pl pr sh sl st tr th".split())
_VOWELS = tuple("a e i o u a e i o ea oo ai".split())
_CODAS = ("", "", "b", "ck", "d", "g", "l", "m", "n", "nd", "p", "r", "rt", "s", "st", "t", "x", "y")


def pseudo_word(rng: Random) -> str:
    """A pronounceable word of 3 to 8 letters that means nothing, so that spelling is learned, not words."""
    while True:
        word = "".join(rng.choice(p) for _ in range(rng.randint(1, 2)) for p in (_ONSETS, _VOWELS, _CODAS))
        if rng.random() < 0.2:
            word = rng.choice("aeiou") + word
        if 3 <= len(word) <= 8 and word not in WORDS:
            return word
