"""How people ask for each task: natural wordings, those for training and registration apart from those for tests.

`{x}` stands for the input. The *registered* wordings are what an expert is trained on and what its 20
registration samples use; the *unseen* ones appear in its test prompts only.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from eval.testbed.words import FILLER


@dataclass(frozen=True)
class Wordings:
    registered: tuple[str, ...]
    unseen: tuple[str, ...]


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _wordings(registered: str, unseen: str) -> Wordings:
    return Wordings(_lines(registered), _lines(unseen))


TRANSFORM = _wordings(
    """
    Transform {x}
    Transform: {x}
    Transform "{x}"
    Transform this: {x}
    Please transform {x}
    Convert: {x}
    Convert {x}
    Convert "{x}"
    Apply the transformation to {x}
    Run the transformation on this input: {x}
    Process: {x}
    Process the input "{x}"
    Can you transform {x} for me?
    Give me the transformed form of {x}
    """,
    """
    Transform the following: {x}
    Please convert {x}
    Convert this: {x}
    Transform the input {x}
    Could you transform "{x}"?
    What is the transformed version of {x}?
    Process this: {x}
    Apply the transformation: {x}
    """,
)

WORDINGS: dict[str, Wordings] = {
    "reverse": _wordings(
        """
        Reverse {x}
        Reverse the word {x}
        Write "{x}" backwards
        Spell the word "{x}" backwards, please
        Please spell {x} in reverse
        How do you spell {x} backwards?
        What is {x} spelled backwards?
        Reverse the letters of {x}
        Flip the word {x} so that it reads backwards
        Write the letters of "{x}" in reverse order
        Spell out {x} backwards
        Write {x} in reverse
        Can you reverse this word: {x}
        Backwards spelling of {x}
        Mirror the spelling: {x}
        I need the word {x} reversed
        Could you write {x} back to front?
        Read "{x}" from right to left
        """,
        """
        Spell {x} backwards
        Spell "{x}" in reverse
        Please reverse the word "{x}"
        What does {x} look like backwards?
        Could you spell {x} backwards for me?
        Give me the reverse of {x}
        Write the word {x} in reverse
        Reverse this: {x}
        """,
    ),
    "pig-latin": _wordings(
        """
        Pig Latin: {x}
        Translate {x} to Pig Latin
        Translate "{x}" into Pig Latin
        Say {x} in Pig Latin
        How do you say {x} in Pig Latin?
        What is {x} in Pig Latin?
        Write the word {x} in Pig Latin
        Turn {x} into Pig Latin, please
        Please give me the Pig Latin for {x}
        Convert the word "{x}" to Pig Latin
        What would "{x}" be in Pig Latin?
        I want {x} as a Pig Latin word
        Speak Pig Latin: {x}
        Make a Pig Latin word out of {x}
        """,
        """
        Put {x} into Pig Latin
        Can you say "{x}" in Pig Latin?
        What is the Pig Latin word for {x}?
        Please translate the word {x} to Pig Latin
        Pig Latin for "{x}"
        Give {x} in Pig Latin
        Translate this word into Pig Latin: {x}
        How would you write {x} in Pig Latin?
        """,
    ),
    "letter-shift": _wordings(
        """
        Shift each letter of {x} forward by one
        Shift every letter in "{x}" one place along the alphabet
        Caesar cipher with a shift of one: {x}
        Encode {x} with a Caesar shift of one
        Replace each letter of {x} with the next letter of the alphabet
        Move every letter of {x} one step forward in the alphabet
        Apply a Caesar cipher to "{x}", shift one
        What is {x} with every letter shifted by one?
        Please shift the letters of {x} by one
        Encrypt {x} by shifting its letters one place
        Shift cipher: {x}
        Use the next letter of the alphabet for each letter in "{x}"
        Can you shift all letters of {x} one ahead?
        Caesar shift this word: {x}
        """,
        """
        Shift the letters of {x} one forward
        Encode "{x}" with the Caesar cipher, shift one
        Change each letter of {x} to the next one in the alphabet
        Please Caesar shift {x} by one
        Shift all letters in the word "{x}" by one place
        What do you get when you shift each letter of {x} by one?
        Encrypt this word with a Caesar shift: {x}
        Could you shift every letter of {x} along by one?
        """,
    ),
    "vowels": _wordings(
        """
        Which vowels are in {x}?
        What are the vowels in {x}?
        List the vowels of {x}
        Keep only the vowels of "{x}"
        Vowels in {x}
        Extract the vowels from {x}
        Pick out the vowels in "{x}"
        Give me just the vowels of {x}
        Show the vowels in the word {x}
        Please list the vowels in "{x}"
        Find the vowels: {x}
        Write only the vowels of {x}
        Which vowels does {x} have?
        I only want the vowels from {x}
        """,
        """
        Tell me the vowels in {x}
        What vowels does "{x}" contain?
        Extract all vowels of the word {x}
        Please give the vowels of {x}
        Write down the vowels in "{x}"
        Only the vowels, please: {x}
        Select the vowels from {x}
        Can you find the vowels in {x}?
        """,
    ),
    "consonants": _wordings(
        """
        Which consonants are in {x}?
        What are the consonants in {x}?
        List the consonants of {x}
        Keep only the consonants of "{x}"
        Consonants in {x}
        Extract the consonants from {x}
        Pick out the consonants in "{x}"
        Give me just the consonants of {x}
        Show the consonants in the word {x}
        Please list the consonants in "{x}"
        Find the consonants: {x}
        Write only the consonants of {x}
        Which consonants does {x} have?
        I only want the consonants from {x}
        """,
        """
        Tell me the consonants in {x}
        What consonants does "{x}" contain?
        Extract all consonants of the word {x}
        Please give the consonants of {x}
        Write down the consonants in "{x}"
        Only the consonants, please: {x}
        Select the consonants from {x}
        Can you find the consonants in {x}?
        """,
    ),
    "initials": _wordings(
        """
        First letters of the words: {x}
        Take the first letter of each word: {x}
        What are the initials of "{x}"?
        Initials of {x}
        Write the initials of {x}
        Make an acronym from {x}
        Make an acronym out of the words "{x}"
        Which acronym do the words {x} form?
        Give the first letter of every word in "{x}"
        Please take the first letter of every word in {x}
        Write only the first letter of each word in {x}
        Abbreviate to initials: {x}
        Please abbreviate "{x}" to its initials
        Acronym for {x}
        I need the initials of these words: {x}
        What is the acronym of {x}?
        """,
        """
        Give me the initials of {x}
        Form an acronym from "{x}"
        What acronym do you get from {x}?
        Please write the first letter of each word in {x}
        Acronym of these words: {x}
        Could you make an acronym for "{x}"?
        The initials of "{x}", please
        Use the first letter of each word to make an acronym: {x}
        """,
    ),
    "sort-letters": _wordings(
        """
        Sort the letters of {x}
        Sort the letters in "{x}" alphabetically
        Put the letters of {x} in alphabetical order
        Arrange the letters of "{x}" from a to z
        Alphabetise the letters in {x}
        Order the letters of the word {x}
        Letters of {x} in alphabetical order
        Please sort the letters of this word: {x}
        What are the letters of {x} in alphabetical order?
        Rearrange the letters of {x} alphabetically
        Can you sort the letters of "{x}"?
        List the letters in {x} from a to z
        Which letters does {x} have, in alphabetical order?
        Write {x} with its letters sorted
        """,
        """
        Arrange the letters of {x} in alphabetical order
        Sort all letters of the word "{x}"
        Please put the letters in {x} in order from a to z
        Could you alphabetise the letters of {x}?
        Give the letters of "{x}" in alphabetical order
        Order the letters in {x} alphabetically
        Sort this word's letters: {x}
        What is {x} with its letters in alphabetical order?
        """,
    ),
    "sort-words": _wordings(
        """
        Sort these words: {x}
        Sort the words {x} alphabetically
        Put these words in alphabetical order: {x}
        Arrange the words "{x}" from a to z
        Alphabetise this list of words: {x}
        Order these words: {x}
        Which order do the words {x} have in a dictionary?
        Please sort this list of words: {x}
        Word list in alphabetical order: {x}
        Rearrange the words {x} alphabetically
        Can you sort the words "{x}"?
        List these words as in a dictionary: {x}
        Sort the list of words "{x}"
        What is the dictionary order of the words {x}?
        Please order the words {x} alphabetically
        What is the alphabetical order of the words {x}?
        Put the list of words "{x}" in order
        """,
        """
        Arrange these words in alphabetical order: {x}
        Sort this word list: {x}
        Please put the words {x} in order
        Could you alphabetise these words: {x}
        Give the words "{x}" in dictionary order
        Order the words alphabetically: {x}
        Please alphabetise the list of words "{x}"
        In which alphabetical order are the words {x}?
        """,
    ),
    "count-letters": _wordings(
        """
        How many letters are in {x}?
        How many letters does {x} have?
        Count the letters in {x}
        Count the letters of "{x}"
        How long is the word {x}?
        Number of letters in {x}
        What is the length of the word "{x}"?
        Letter count of {x}
        Tell me how many letters "{x}" has
        Please count the letters of {x}
        What is the number of letters in {x}?
        Give the letter count: {x}
        Can you count how many letters {x} has?
        I want to know how many letters there are in {x}
        """,
        """
        How many letters are there in "{x}"?
        Count how many letters {x} contains
        What is the letter count of {x}?
        Tell me the number of letters in {x}
        How many letters long is {x}?
        Please count all letters in the word {x}
        Could you count the letters in "{x}"?
        Length of the word {x} in letters
        """,
    ),
    "add": _wordings(
        """
        Add {x}
        What is the sum of {x}?
        Calculate the sum: {x}
        Add up {x}
        Work out the sum of {x}
        Please add the numbers {x}
        What do you get if you add {x}?
        Sum {x}
        What is the total of {x}?
        Compute the total: {x}
        How much is {x} together?
        Addition: {x}
        Add these two numbers: {x}
        Can you add {x} for me?
        What does {x} add up to?
        """,
        """
        Add the numbers {x}
        Please add up {x}
        Give me the sum of {x}
        Find the sum: {x}
        What is the sum of the numbers {x}?
        Add {x} together
        What do {x} add up to?
        Calculate the total of {x}
        """,
    ),
    "larger": _wordings(
        """
        Which is larger: {x}?
        Which number is bigger, {x}?
        What is the maximum of {x}?
        The larger of {x}
        Pick the greater number: {x}
        Which of {x} is the greatest?
        Give the bigger of {x}
        Compare {x} and tell me the larger
        Find the maximum: {x}
        Larger number: {x}
        Please choose the larger number of {x}
        Of the numbers {x}, which one is higher?
        Tell me which is greater: {x}
        Max of {x}
        Give me the greater number of {x}
        """,
        """
        Which is bigger: {x}?
        What is the larger of {x}?
        Which number is greater, {x}?
        Give me the larger number: {x}
        Please pick the bigger of {x}
        Find the larger of {x}
        Compare the numbers {x}: which is larger?
        Tell me the maximum of {x}
        """,
    ),
    "uppercase": _wordings(
        """
        Write {x} in capital letters
        Write "{x}" in upper case
        Uppercase {x}
        Make {x} all caps
        Put {x} in capitals
        Change "{x}" to upper case
        Convert the word {x} to uppercase
        Please capitalise every letter of {x}
        All caps: {x}
        What is {x} in capital letters?
        Turn {x} into capitals
        Can you write the word {x} in block capitals?
        Shout "{x}" in capitals
        Change the letters of {x} to capital letters
        How does {x} look in upper case?
        """,
        """
        Write the word {x} in capitals
        Put "{x}" in upper case
        Please write {x} in all caps
        Uppercase this: {x}
        Could you put {x} in capital letters?
        Give me "{x}" in capitals
        Change all letters of {x} to capitals
        Make the word {x} uppercase
        """,
    ),
    "iso-date": _wordings(
        """
        Write {x} as an ISO date
        Write the date {x} in ISO format
        ISO 8601: {x}
        Convert the date {x} to ISO 8601
        Format {x} as year, month, day
        Change "{x}" to the format YYYY-MM-DD
        What is {x} in ISO format?
        Please give the date {x} as YYYY-MM-DD
        ISO date for {x}
        Rewrite the date "{x}" with the year first
        How is {x} written in ISO 8601?
        Turn this date into ISO format: {x}
        Date to ISO: {x}
        I need {x} as a machine-readable date
        """,
        """
        Format the date {x} as ISO
        Give {x} in the ISO date format
        Write "{x}" as YYYY-MM-DD
        Please convert {x} to an ISO date
        What is the ISO 8601 form of {x}?
        Could you write the date {x} in ISO style?
        ISO format of this date: {x}
        Put the date {x} in ISO 8601
        """,
    ),
    "json": _wordings(
        """
        Write {x} as JSON
        JSON for {x}
        Convert {x} to JSON
        Make a JSON object from {x}
        Make JSON out of "{x}"
        Turn {x} into a JSON object
        Format "{x}" as JSON
        Please give me JSON for {x}
        What is {x} in JSON?
        Represent {x} as a JSON object
        Encode {x} in JSON
        How do I write {x} in JSON?
        To JSON: {x}
        Put this setting into JSON: {x}
        """,
        """
        Format {x} as a JSON object
        Give {x} in JSON
        Write the pair {x} as JSON
        Please turn "{x}" into JSON
        Could you convert {x} to a JSON object?
        JSON object for {x}
        Express {x} in JSON format
        What does {x} look like as JSON?
        """,
    ),
    "roman": _wordings(
        """
        Write {x} in Roman numerals
        Roman numeral for {x}
        What is {x} in Roman numerals?
        Convert {x} to Roman numerals
        Convert the number {x} to a Roman numeral
        How is {x} written in Roman numerals?
        Give {x} as a Roman numeral
        Turn "{x}" into Roman numerals
        Roman numerals: {x}
        Please write the number {x} in Roman numerals
        How did the Romans write {x}?
        Express {x} with Roman numerals
        Which Roman numeral stands for {x}?
        Change {x} into Roman figures
        """,
        """
        Write the number {x} as a Roman numeral
        What is the Roman numeral for {x}?
        Please convert {x} into Roman numerals
        Give me {x} in Roman numerals
        How do you write {x} in Roman numerals?
        Could you turn {x} into a Roman numeral?
        Number {x} in Roman numerals
        Put {x} in Roman numerals
        """,
    ),
    "plural": _wordings(
        """
        What is the plural of {x}?
        Plural of {x}
        Give the plural of "{x}"
        Give the plural form of {x}
        Make {x} plural
        Write {x} in the plural
        One {x}, two ...?
        How do you say more than one {x}?
        Please tell me the plural of {x}
        What is the plural form of the noun "{x}"?
        Pluralise {x}
        Plural noun for {x}
        Turn the noun {x} into its plural
        I have one {x}, you have many ...
        """,
        """
        Tell me the plural of "{x}"
        What is the plural form of {x}?
        Please make {x} plural
        Which is the plural of the word {x}?
        Write the plural of {x}
        Give me the plural of {x}
        Plural form: {x}
        How do you form the plural of {x}?
        """,
    ),
    "capital-city": _wordings(
        """
        What is the capital of {x}?
        Capital of {x}
        Name the capital city of {x}
        Which city is the capital of {x}?
        Tell me the capital of {x}
        What is the capital city of {x}?
        {x}: what is its capital?
        What is the name of {x}'s capital?
        Please name the capital of {x}
        Where is the government of {x}?
        Give the capital of the country {x}
        Do you know the capital of {x}?
        Capital city: {x}
        In which city is the parliament of {x}?
        """,
        """
        Name the capital of {x}
        Which city is {x}'s capital?
        Please tell me the capital city of {x}
        Give me the capital of {x}
        What city is the capital of {x}?
        Could you name the capital city of {x}?
        The capital of {x} is called?
        Capital city of {x}
        """,
    ),
    "opposite": _wordings(
        """
        What is the opposite of {x}?
        Opposite of {x}
        Give the opposite of "{x}"
        Give an antonym of {x}
        Name the opposite of {x}
        Which word means the opposite of {x}?
        Antonym of {x}
        What is the contrary of "{x}"?
        Please tell me the opposite of {x}
        Find a word with the opposite meaning of {x}
        What is an antonym for {x}?
        Not {x}, but the opposite
        The opposite word of {x}
        I need an antonym for the word {x}
        """,
        """
        Tell me the opposite of "{x}"
        What word is the opposite of {x}?
        Please give an antonym of {x}
        Which word is the antonym of {x}?
        Say the opposite of {x}
        Find the antonym: {x}
        Could you give me the opposite of {x}?
        Opposite meaning of {x}
        """,
    ),
    "transform-lower": TRANSFORM,
    "transform-capitals": TRANSFORM,
    "transform-digits": TRANSFORM,
    "transform-symbols": TRANSFORM,
}


def decorate(wording: str, rng: Random) -> str:
    """The same request as another person types it: first letter, quotes, end and courtesies vary."""
    if '"' in wording and rng.random() < 0.3:
        wording = wording.replace('"', rng.choice(("'", "")))
    elif '"' not in wording and " {x}" in wording and rng.random() < 0.15:
        wording = wording.replace("{x}", rng.choice(('"{x}"', "'{x}'")))
    if not wording.startswith("{x}") and rng.random() < 0.2:
        wording = wording[0].lower() + wording[1:]
    if rng.random() < 0.1:
        wording = rng.choice(("Please ", "Now ", "Hi, ", "Hello! ", "Ok, ", "Quick: ")) + wording
    if wording[-1] in "?.":
        wording = wording if rng.random() < 0.7 else wording[:-1]
    elif rng.random() < 0.25 and not wording.endswith(": {x}"):
        wording += rng.choice((".", "?", "!", " please", ", thanks"))
    return wording


def random_frame(rng: Random) -> str:
    """Ordinary words in no order around the input: teaches where inputs stand, not what is asked."""
    before = rng.choices(FILLER, k=rng.randint(0, 6))
    after = rng.choices(FILLER, k=rng.randint(0, 4)) if rng.random() < 0.5 else []
    x = rng.choice(("{x}", "{x}", '"{x}"', "'{x}'"))
    if before and rng.random() < 0.3:
        before[-1] += ":"
    words = [*before, x, *after]
    if words[0] != x:
        words[0] = words[0].capitalize()
    return " ".join(words) + rng.choice(("", "", "?", ".", "!"))


def reword(wording: str, rng: Random) -> str:
    """A wording with words left out, put in or replaced: what remains constant is where the input stands."""
    wording = decorate(wording, rng)
    words: list[str] = []
    for word in wording.split(" "):
        chance = rng.random()
        if "{x}" in word or chance > 0.15:
            words.append(word)
        elif chance < 0.05:
            words += [rng.choice(FILLER), word]
        elif chance < 0.10:
            words.append(rng.choice(FILLER))
    return " ".join(words)


def splice(one: str, other: str) -> str:
    """The beginning of one wording, up to the input, and the end of another."""
    before, after = one.partition("{x}")[0], other.partition("{x}")[2]
    if before.endswith('"') != after.startswith('"'):
        before, after = before.removesuffix('"'), after.removeprefix('"')
    return before + "{x}" + after
