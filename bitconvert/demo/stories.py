"""Endless small stories, written by a grammar: the text that `bitconvert demo` trains and measures on.

A story is a plot, a plot is a row of scenes, and a scene says a few sentences about the facts of one tale: who it is
about, where, and with what. Facts are drawn once and kept to the end, so a model that reads the text has something to
learn beyond the next word: who "she" is, what was put into the bag, how many plums are left.

Sentences are templates: `[ran|walked]` stands for one of its alternatives (they nest, and one may be empty),
`<color>` for any word of that list, and `{hero.his}` for a fact. The same seed gives the same text on every machine.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

MODEL_SEED = 1
"""The stories that the embedded model and its tokenizer were trained on."""
WARMUP_SEED = 2
"""The stories that the demo's warmup trains on; the embedded model saw none of them."""
HELD_OUT_SEED = 3
"""The stories that nobody trains on; perplexity is measured here."""

Item = TypeVar("Item")

WORDS = {
    "girl": "Anna Bella Clara Daisy Ella Freya Greta Hanna Ida Julia Kira Lily Mia Nora Olga Penny Rosa Sara Tina Vera",
    "boy": "Adam Ben Carl David Emil Felix George Hugo Ivan Jack Karl Leo Max Noah Oscar Paul Rolf Sam Tom Victor",
    "creature": "bear fox rabbit mouse duck owl goat hedgehog squirrel badger frog donkey",
    "animal": "cow horse cat dog sheep hen goose swan snail beetle deer crow bee lion pony crab bird wolf snake fly",
    "trait": "kind brave clever gentle quiet patient cheerful curious careful honest polite friendly wise funny",
    "color": "red blue green yellow white black brown gray golden silver pink orange",
    "quality": "wooden shiny old new tiny big soft round pretty plain heavy fine thin strange",
    "toy": "ball kite doll drum boat book cup bell ring box coin flute mask clock wagon crown fan lamp chair spoon",
    "clothing": "coat hat scarf cap shirt belt apron dress cloak ribbon glove shoe",
    "food": "bread soup cake honey cheese pie jam rice salad toast beans corn butter fish cookies ham",
    "drink": "milk tea juice water cocoa lemonade",
    "fruits": "apples plums pears cherries berries nuts eggs mushrooms peaches grapes lemons figs",
    "finds": "shells flowers stones leaves feathers coins buttons",
    "number": "two three four five six seven eight nine ten eleven twelve",
    "job": "farmer sailor baker miller drummer pilot hunter painter tailor shepherd singer doctor soldier teacher cook",
    "game": "tag chess cards catch pirates marbles football tennis",
    "went": "went walked ran hurried rode wandered skipped marched",
    "said": "said called cried whispered laughed shouted",
    "pace": "slowly quickly happily quietly carefully calmly merrily proudly eagerly bravely",
    "tone": "gently happily proudly gladly politely warmly calmly kindly slowly bravely",
    "glad": "happy glad proud joyful excited pleased thankful merry",
    "sad": "sad worried tired lonely upset nervous hungry thirsty cold sleepy",
    "season": "spring summer autumn winter",
    "hour": "morning afternoon evening night",
    "weekday": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "do": "swim sing draw read dance climb bake paint fish run dream laugh",
}
LEXICON = {name: words.split() for name, words in WORDS.items()}
LEXICON["look"] = LEXICON["color"] + LEXICON["quality"]
LEXICON["many"] = LEXICON["fruits"] + LEXICON["finds"]
LEXICON["name"] = LEXICON["girl"] + LEXICON["boy"]
PHRASES = {
    "<item>": "[a <quality> <color> [<toy>|<clothing>]|<number> [<quality> |]<color> <many>]",
    "<somebody>": "[a <trait> <job>|a <sad> <color> <animal>|<number> <trait> <job>s|<name> the <job>]",
    "<meal>": "[<food> and <drink>|<food> with <number> <fruits>|<number> <fruits>, <food> and <drink>]",
}

ELDERS = {"mother": "she", "grandmother": "she", "aunt": "she", "father": "he", "grandfather": "he", "uncle": "he"}
LOST_ONES = ("kitten", "puppy", "lamb", "duckling", "piglet", "chick", "calf", "baby bird")
SEEDS = (("pumpkin", "pumpkins"), ("bean", "beans"), ("rose", "roses"), ("carrot", "carrots"), ("melon", "melons"))
SINGULAR = {"cherries": "cherry", "berries": "berry", "leaves": "leaf", "peaches": "peach"}
COUNT = ["no", "one", *LEXICON["number"]]

PLACES = {
    # the place: where one is when there, and four spots to look or hide in
    "forest": ("in the forest", "under a fern", "behind a tall oak", "in a hollow log", "between two roots"),
    "beach": ("on the beach", "under the sand", "behind a rock", "beside an old net", "in a cave"),
    "garden": ("in the garden", "under a bush", "between the roses", "behind the shed", "beside the gate"),
    "market": ("at the market", "under a table", "behind a cart", "between two barrels", "beside the cheese stand"),
    "farm": ("at the farm", "in the hay", "behind the barn", "under the wagon", "beside the well"),
    "river": ("by the river", "under the bridge", "between the reeds", "behind a willow", "beside a flat stone"),
    "hill": ("on the hill", "behind a stone wall", "in the tall grass", "under a lonely pine", "beside the path"),
    "lake": ("by the lake", "under a boat", "in the reeds", "behind a fallen tree", "beside the dock"),
    "park": ("in the park", "under a bench", "behind the swings", "in a heap of leaves", "beside the fountain"),
    "mill": ("at the mill", "under the stairs", "behind a sack of flour", "beside the wheel", "in a dusty corner"),
    "village": ("in the village", "under a window", "behind the bakery", "beside the church", "in a narrow lane"),
    "castle": ("at the castle", "in the tower", "behind a curtain", "under a long table", "beside the iron door"),
    "meadow": ("in the meadow", "in the clover", "behind a fence", "under a thorn bush", "beside the brook"),
    "station": ("at the station", "under a seat", "behind a trunk", "beside the ticket window", "between the bags"),
}
WEATHER = (
    # the weather, and what it made people do
    (
        "the sun was [hot|bright|strong]",
        "[sat in the shade|wore a <quality> <color> hat|drank <drink> with <somebody>]",
    ),
    ("it was raining", "[took a <quality> <color> umbrella|jumped over <number> puddles|wore a <color> <clothing>]"),
    ("the wind was [cold|strong|loud]", "[put on a <color> <clothing>|held {hero.his} <color> hat|<went> <pace>]"),
    ("snow was falling", "[put on a <quality> <color> <clothing>|<went> <pace>|wore a thick <color> <clothing>]"),
    ("fog lay over the land", "[<went> <pace>|carried <item>|stayed near <somebody>]"),
    ("the sky was clear", "[sang <tone>|counted <number> birds|looked <pace> at <somebody>]"),
    ("dark clouds came", "[<went> <pace>|looked for <somebody>|put on a <color> <clothing>]"),
    ("the air smelled of [flowers|rain|hay]", "[sang <tone>|danced <pace> with <somebody>|thought of <meal>]"),
)
TOOLS = (
    # the tool, the trouble of {friend}, how {hero} uses the tool, and what follows
    ("rope", "had fallen into a deep hole", "let the rope down and pulled", "{friend} climbed out"),
    ("lantern", "could not find the way out of a dark cave", "lit the lantern and called", "{friend} saw the light"),
    ("key", "was locked in a [barn|cellar|shed]", "put the key into the lock and turned it", "the door opened"),
    ("ladder", "was stuck in a [high|tall] tree", "leaned the ladder against the tree", "{friend} climbed down"),
    ("blanket", "was wet and shaking with cold", "put the blanket around {friend}", "{friend} was warm again"),
    ("map", "did not know the way home", "opened the map and showed the road", "{friend} knew where to go"),
    ("bucket", "saw a fire in the hay", "filled the bucket and threw the water", "the fire went out"),
    ("needle", "had a hole in the [sail|tent|bag]", "took the needle and sewed the hole", "it was as good as new"),
    ("hammer", "had a broken [fence|cart|chair]", "took the hammer and drove in a nail", "it was strong again"),
    ("board", "could not cross the [brook|ditch]", "laid the board over the water", "{friend} walked across"),
    ("shovel", "could not open the door because of the snow", "took the shovel and dug", "the door was free"),
    ("bandage", "had hurt [a knee|an elbow|a foot]", "tied the bandage with care", "it did not hurt so much"),
    ("knife", "was caught in a net", "cut the net with the knife", "{friend} was free"),
    ("whistle", "was lost in the fog", "blew the whistle <number> times", "{friend} followed the sound"),
)
FEARS = (
    ("the dark", "sat in the dark"),
    ("deep water", "stood in the deep water"),
    ("thunder", "listened to the thunder"),
    ("dogs", "patted a dog"),
    ("high places", "climbed to the top"),
    ("loud noises", "beat a loud drum"),
    ("spiders", "held a spider"),
    ("the old bridge", "crossed the old bridge"),
    ("strangers", "spoke to a stranger"),
    ("the cold sea", "swam in the cold sea"),
)


@dataclass(frozen=True)
class Someone:
    """A name and the pronouns that go with it."""

    name: str
    kind: str
    he: str

    @property
    def him(self) -> str:
        """The object form: I saw him."""
        return "her" if self.he == "she" else "him"

    @property
    def his(self) -> str:
        """The possessive form: I saw his hat."""
        return "her" if self.he == "she" else "his"

    def __str__(self) -> str:
        return self.name


class Tale:
    """The facts of one story and the sentences said so far."""

    _ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
    _WORD = re.compile(r"<(\w+)>")
    _ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou]|honest)")

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.sentences: list[str] = []
        self.facts: dict[str, object] = {}
        self.spots: Sequence[str] = ()

    def pick(self, options: Sequence[Item]) -> Item:
        """One of the options; built on random() alone, the one method whose sequence Python promises to keep."""
        return options[int(self.rng.random() * len(options))]

    def know(self, **facts: object) -> None:
        """Remember facts; a text is expanded now, so that it reads the same each time it is used."""
        for name, fact in facts.items():
            self.facts[name] = self._expand(fact) if isinstance(fact, str) else fact

    def say(self, *templates: str) -> None:
        """Add one sentence, written by one of the templates; an empty template stays silent."""
        if sentence := self._expand(self.pick(templates)):
            self.sentences.append(sentence[0].upper() + sentence[1:])

    def _expand(self, template: str) -> str:
        text, last = template, ""
        for phrase, meaning in PHRASES.items():
            text = text.replace(phrase, meaning)
        while text != last:  # from the innermost brackets outwards
            last, text = text, self._ALTERNATIVES.sub(lambda match: self.pick(match[1].split("|")), text)
        text = self._WORD.sub(lambda match: self.pick(LEXICON[match[1]]), text.format_map(self.facts))
        text = re.sub(r"\s+(?=[ ,.!?])", "", text).strip()
        return self._ARTICLE.sub(r"\1n ", text)


# The facts that a tale keeps to its end -----------------------------------------------------------------------------


def draw_facts(tale: Tale) -> None:
    """Choose the people, the place, the weather and the thing that the story is about."""
    hero = draw_someone(tale, unlike="")
    friend = draw_someone(tale, unlike=hero.name)
    elder = tale.pick(list(ELDERS))
    tale.know(hero=hero, friend=friend, elder=Someone(elder, elder, ELDERS[elder]))
    place = tale.pick(list(PLACES))
    there, *tale.spots = PLACES[place]
    tale.know(place=place, there=there, trait="<trait>", food="<food>", thing="<quality> <color> <toy>")
    weather, effect = tale.pick(WEATHER)
    tale.know(weather=weather, effect=effect)


def draw_someone(tale: Tale, unlike: str) -> Someone:
    """A boy, a girl or an animal, with another name than the one before."""
    kind, he = tale.pick((("girl", "she"), ("boy", "he")))
    name = tale.pick([name for name in LEXICON[kind] if name != unlike])
    return Someone(name, tale.pick((kind, tale.pick(LEXICON["creature"]))), he)


# Scenes that many plots share ---------------------------------------------------------------------------------------


def opening(tale: Tale) -> None:
    """Introduce the hero."""
    tale.say(
        "[once|long ago|many years ago|one <season>], there was a {trait} [little|young|] {hero.kind} named {hero}.",
        "{hero} was a {trait} [little|young|] {hero.kind} who lived with <somebody> and a <color> <animal>.",
        "in a <quality> <color> house near the {place} lived a {trait} {hero.kind} [named|called] {hero}.",
        "there was once a <sad> [little|young|] {hero.kind} named {hero}, who was {trait} but often <sad>.",
        "everyone {there} knew {hero}, a {trait} {hero.kind} with a <color> <clothing> and <item>.",
        "this is the story of {hero}, a {trait} {hero.kind} who [liked to <do>|had <item> and <item>].",
    )
    tale.say(
        "{hero.he} liked to <do> and to [eat <meal>|play <game> with <somebody>|look for <many>].",
        "{hero.his} best friend was {friend}, a [<trait>|<sad>|little] {friend.kind} with <item>.",
        "{hero.his} {elder}, once a <trait> <job>, often told {hero.him} about <somebody> and <item>.",
        "every <weekday> {hero.he} wore a <look> <clothing> and played <game> with [{friend}|<somebody>].",
        "",
    )


def going(tale: Tale) -> None:
    """Take the hero to the place, through the weather."""
    tale.say(
        "one <season> <hour>, {hero} <went> [<pace>|] to the {place} with [<somebody>|<meal>] and <item>.",
        "on <weekday>, {hero} and {hero.his} {elder} <went> to the {place} [with <item>|to sell <item>|to <do>].",
        "one <weekday> <hour>, {hero} [wanted|decided|hoped] to visit the {place} and [look for <item>|eat <meal>].",
        "{hero} put <meal> and <item> into a <look> bag and <went> <pace> to the {place}.",
        '"Let us go to the {place}," <said> <somebody> one <season> <hour>, and {hero} <went> along.',
    )
    tale.say(
        "{weather}, so {hero.he} {effect}.",
        "{hero.he} {effect}, because {weather}.",
        "[when|while|as] {weather}, {hero} {effect}.",
        "on the way {hero.he} [saw|met|passed] <somebody> with <item> and <item>.",
        "<somebody> with <item> [smiled at|waved to|greeted] {hero} <tone>.",
        "",
    )


def meeting(tale: Tale) -> None:
    """Let the friend come along."""
    tale.say(
        "there {hero.he} [met|saw|found] {friend}, a <trait> [little|young|] {friend.kind} with <item>.",
        "{friend} the {friend.kind} was [eating <meal>|drinking <drink>|playing <game>] [{there}|with <somebody>].",
        "[soon|then|after a while], {friend} the {friend.kind} came by with [<meal>|<item>|<somebody>].",
        '"[Hello|Good <hour>|Welcome], {hero}," <said> {friend}, a <sad> {friend.kind} with <item>.',
    )
    tale.say(
        '"[Shall we|Can we|Will you] [play <game>|eat <meal>|look for <item>]?" asked {friend} <tone>.',
        "they talked <tone> about [<meal>|<item>|<somebody>] and [played <game>|shared <meal>].",
        "{friend} looked <sad>, and {hero} <tone> gave {friend.him} [<item>|<meal>].",
        "",
    )


def thanks(tale: Tale) -> None:
    """Let the friend say thank you."""
    tale.say(
        '"[Thank you|Thank you so much|Many thanks], {hero}!" <said> {friend} [<tone>|and gave {hero.him} <item>].',
        "{friend} was <glad> and gave {hero} [<item>|<item> and <item>|<meal>].",
        '"You are [so|very|really] {trait}, {hero}," <said> {friend} <tone>, and gave {hero.him} [<item>|<meal>].',
        '"[I will never forget this|This is for you], {hero}," <said> {friend} <tone>, and gave {hero.him} <item>.',
    )


def supper(tale: Tale) -> None:
    """Go home and eat."""
    tale.say(
        "[then|later|on <weekday>|that <hour>], {hero} ate {food} with <fruits> and drank <drink> with <somebody>.",
        "at home, {hero.his} {elder} made {food} and told a story about <somebody> and <item>.",
        "when {hero} told {hero.his} {elder} about {friend}, {elder.he} was <glad> and made {food} with <fruits>.",
        "{hero} and {friend} ate {food} and played <game> with <somebody> [until night|all <hour>].",
        "{hero}, {friend} and {hero.his} {elder} ate {food} and <number> <fruits> from a <quality> <color> bowl.",
    )


def ending(tale: Tale) -> None:
    """Close the story."""
    tale.say(
        "that night, {hero} dreamed of <item>, [<meal>|<item>] and <somebody>.",
        "from that <weekday> on, {hero} and {friend} [played <game>|ate <meal>] every <hour> with <somebody>.",
        "and {friend} [never forgot|always remembered|told <somebody>] how {trait} {hero} had been with <item>.",
        "[now|after that], {hero} goes to the {place} every <weekday> with [{friend}|<somebody>] and <item>.",
        "{hero} was <glad>, for it is good to be {trait} and to [have <item>|<do> with <somebody>].",
        "{friend} fell asleep <pace>, and {hero} read a book about <somebody> and <somebody>.",
    )


# Scenes that make one plot differ from another ----------------------------------------------------------------------


def take_tool(tale: Tale) -> None:
    """Something useful is found, and kept."""
    tool, trouble, use, result = tale.pick(TOOLS)
    tale.know(tool=tool, trouble=trouble, use=use, result=result, spot=tale.pick(tale.spots))
    tale.say(
        "{spot}, {hero.he} [found|saw|noticed] a <look> {tool} and put it into {hero.his} <color> bag.",
        '{hero.his} {elder} gave {hero.him} a <look> {tool} and said, "[Take it|You may need it|Keep it well]."',
        "{hero} [bought|borrowed] a <look> {tool} from <somebody> for <item>.",
        "<somebody> lost a <look> {tool} {there}, and {hero} <pace> [picked it up|took it along].",
    )


def use_tool(tale: Tale) -> None:
    """The friend is in trouble, and what was kept helps."""
    tale.say(
        "[suddenly|then|a little later], <somebody> called {hero}: {friend} the {friend.kind} {trouble}.",
        "{there}, {hero} [met|found] {friend}, a <sad> {friend.kind} [with a <color> <clothing>|] who {trouble}.",
        '"Help!" [cried|called|shouted] {friend}, a <sad> {friend.kind} who {trouble}.',
    )
    tale.say(
        "{hero} was <sad>, but [<somebody>|{friend}] [saw|remembered|thought of] the {tool}.",
        '"[Wait|Do not worry|Do not be afraid], {friend}, I have a {tool} and <item>," <said> {hero}.',
        '"How lucky that I have [this|the] {tool}!" <said> {hero} <tone> to <somebody>.',
    )
    tale.say(
        "[with both hands|<pace>], {hero.he} {use}, and [then|at last] {result} [|, and <somebody> was <glad>].",
        "{hero} {use}, and [after <number> minutes|soon] {result} [|, and they danced with <somebody>].",
    )


def lose_thing(tale: Tale) -> None:
    """Something dear is lost, and looked for in a wrong spot before the right one."""
    wrong = tale.pick(tale.spots)
    tale.know(wrong=wrong, right=tale.pick([spot for spot in tale.spots if spot != wrong]))
    tale.say(
        "{hero.he} had a {thing}, and {hero.he} carried it <pace> [everywhere|to the {place}|through the {place}].",
        "{hero.his} {elder} had [given|made|bought] {hero.him} a {thing} [for <item>|last <season>].",
        "<somebody> had given {hero.him} a {thing} for <item>.",
    )
    going(tale)
    tale.say(
        "[but|suddenly|then] the {thing} was gone, and {hero} was [very|] <sad>.",
        "when {hero.he} wanted to show the {thing} to <somebody>, {hero.he} could not find it.",
        '"[Oh no|Oh dear], where is my {thing}?" <said> {hero} <tone>.',
    )
    tale.say(
        "{hero.he} <pace> [looked|searched] {wrong}, but there was only <item>.",
        "{wrong} there was only <somebody> with <item>.",
        '"Maybe it is {wrong}," <said> {friend} the <trait> {friend.kind}, but it was not.',
    )
    tale.say(
        "[then|at last], {friend} the {friend.kind} <pace> looked {right}, and there was the {thing} [|beside <item>].",
        '"Look {right}!" <said> {friend} <tone>, and {hero} [found|saw] the {thing} [|beside <item>].',
        "{friend}, a <trait> {friend.kind}, found the {thing} {right} and was <glad>.",
    )


def share(tale: Tale) -> None:
    """Count, give away, and count again."""
    total = tale.pick(range(2, len(COUNT)))
    given = tale.pick(range(1, total))
    fruits = tale.pick(LEXICON["many"])
    tale.know(fruits=fruits, total=COUNT[total], given=counted(given, fruits), left=counted(total - given, fruits))
    tale.say(
        "{there}, {hero.he} <pace> [found|gathered|picked up|counted] {total} [<color>|big|small|] {fruits}.",
        "<somebody> [gave|sold|brought] {hero.him} {total} [<color>|big|small|] {fruits} [for <item>|].",
        "{hero} had {total} {fruits} in {hero.his} <quality> <color> [bag|basket|hat].",
    )
    meeting(tale)
    tale.say(
        "{friend} had no {fruits}, so {hero} <pace> gave {friend.him} {given}.",
        '"I have no {fruits}," <said> {friend} <tone>, and {hero} [gave|handed] {friend.him} {given}.',
        "because {friend} was <sad>, {hero} gave {friend.him} {given}.",
        '"Please take {given}," {hero} <said> <tone>, and {friend} was <glad>.',
    )
    tale.say(
        "now {hero} had {left}, and {friend} had {given} [and <item>|].",
        "then {hero} counted <tone>: {left}.",
        '"That leaves {left} for me," <said> {hero} <tone>.',
    )


def counted(number: int, plural: str) -> str:
    """In words: "one cherry", "seven cherries"."""
    return f"{COUNT[number]} {SINGULAR.get(plural, plural[:-1]) if number == 1 else plural}"


def quarrel(tale: Tale) -> None:
    """Two want the same thing, and make peace."""
    meeting(tale)
    tale.say(
        "{hero} and {friend} both [wanted|saw|found] a {thing} [that lay {there}|at the same time].",
        "{hero} had a {thing}, and {friend} <pace> [took|grabbed] it [|without asking|from {hero.him}].",
        '"[That is|This is] my {thing}!" <said> {friend}, but {hero} [pulled|held it] <pace>.',
    )
    tale.say(
        "{friend} was <sad> and [ran away|began to cry|hid behind <somebody>], and {hero} felt <sad> too.",
        "they pulled and pulled until the {thing} fell on <somebody> with <item>.",
        "for <number> days, {hero} [did not talk to {friend}|was <sad> and ate only <meal>].",
    )
    tale.say(
        '"I am sorry, {friend}," {hero} <said> <tone>, "let us [share it|play <game>|eat <meal>]."',
        'then {hero.his} {elder} <said> <tone>, "Friends share," and so they shared the {thing} and <meal>.',
        'at last {friend} brought the {thing} back with <item> and said, "I am sorry, {hero}."',
        "{hero} <went> to {friend} with {food}, and they played <pace> with the {thing}.",
    )


def gift(tale: Tale) -> None:
    """Prepare a present, hide it, give it."""
    tale.say(
        "on <weekday> was the birthday of {friend}, a <trait> {friend.kind} with a <color> <clothing>.",
        "{friend}, a {friend.kind}, was <sad>, and {hero} wanted to give {friend.him} something [new|pretty|soft].",
        '"What can I give {friend} the {friend.kind}?" {hero} asked [{hero.his} {elder}|<somebody>] <tone>.',
    )
    tale.say(
        "{hero.he} worked for <number> [days|weeks] and [made|bought|painted] a {thing} and <item>.",
        '"Give {friend.him} a {thing}," <said> {hero.his} {elder}, and {hero} bought it for <item>.',
        "so {hero.he} <pace> [made|bought|found] a {thing} and hid it under <item>.",
    )
    tale.say(
        "when {friend} [opened|saw] the gift, {friend.he} was <glad> and danced <pace> with <somebody>.",
        '"Oh, a {thing}!" {friend} <said> <tone>, and {friend.he} was <glad>.',
        "{friend} loved the {thing} and <pace> showed it to <somebody> and <somebody>.",
    )


def courage(tale: Tale) -> None:
    """Be afraid, try it with a friend, be proud."""
    fear, deed = tale.pick(FEARS)
    tale.know(fear=fear, deed=deed)
    tale.say(
        "but {hero.he} was [very|so|] afraid of {fear} [since last <season>|].",
        '"I am afraid of {fear}," {hero.he} told [{hero.his} {elder}|<somebody>] <tone>.',
    )
    going(tale)
    tale.say(
        '{friend} the {friend.kind} <said> <tone>, "[I will help you|Take my hand|I was afraid too], {hero}."',
        '"Are you [still|really] afraid of {fear}, {hero}?" asked {friend}, a <trait> {friend.kind}.',
        "{friend}, a <trait> {friend.kind} with <item>, knew that {hero} was afraid of {fear}.",
    )
    tale.say(
        "they <pace> counted to <number>, and {hero} {deed} [<pace>|for <number> minutes|].",
        "[<number> times|first] {hero} ran away, but [then|on <weekday>|that <hour>] {hero.he} {deed}.",
        "<pace>, with a <sad> face, {hero} {deed}, and <somebody> [clapped|watched|was <glad>].",
    )
    tale.say(
        "now {hero} is no longer afraid of {fear}, [and {friend} is <glad>|only of <somebody>].",
        '"I did it!" <said> {hero} <tone>, and {friend} was <glad>.',
    )


def lost_one(tale: Tale) -> None:
    """Bring a lost animal home, asking on the way."""
    home = tale.pick([place for place in PLACES if place != tale.facts["place"]])
    tale.know(lost=tale.pick(LOST_ONES), home=home)
    tale.say(
        "{there}, {hero.he} [saw|found|met] a [<sad>|<color>] {lost} that was looking for its mother.",
        "a [<sad>|<color>] {lost} [sat|stood|lay] {there} and looked <pace> at {hero}.",
    )
    tale.say(
        '"Where is your [mother|home]?" asked {hero} <tone>, but the {lost} only [cried|looked at a <animal>].',
        "{hero} gave the {lost} <meal> and asked [<somebody>|{hero.his} {elder}] where it lived.",
        '"[Come with me|Do not cry|You are not alone], little one," {hero} <said> to the {lost} <tone>.',
    )
    tale.say(
        '{friend} the {friend.kind} <said> <tone>, "Its [mother|family] is at the {home}."',
        "{friend}, a <trait> {friend.kind} with <item>, [knew|thought] that the {lost} lived at the {home}.",
    )
    tale.say(
        "so {hero} <pace> [carried|took|led] the {lost} to the {home}, and its mother was <glad>.",
        "they walked <pace> for <number> hours to the {home}, where the mother of the {lost} waited.",
        "at the {home}, the {lost} <pace> ran to its mother, and {hero} was <glad>.",
    )


def race(tale: Tale) -> None:
    """Run against each other; winning is not all."""
    hero, friend = tale.facts["hero"], tale.facts["friend"]
    winner = tale.pick((hero, friend))
    tale.know(winner=winner, loser=friend if winner is hero else hero)
    tale.say(
        '"[I am faster than you|Let us race], {hero}!" <said> {friend} the {friend.kind} <tone>.',
        "there was a race {there}, and {friend}, a <trait> {friend.kind} with a <color> <clothing>, took part too.",
        "{hero} and {friend} the {friend.kind} wanted to race [to a <look> bench|with <somebody>|for <item>].",
    )
    tale.say(
        "the winner would [get|win] a {thing} and <item>.",
        "{hero.his} {elder} [promised|offered] a {thing} and <meal> to the winner.",
        '"Whoever wins gets a {thing}," <said> <somebody> [with a <color> <clothing>|].',
    )
    tale.say(
        "[halfway|near the end|at the start], {loser} fell over <somebody>, and {winner} won.",
        "{loser} ran <pace> with <somebody>, but {winner} was [faster|a little faster].",
        "at first {loser} was in front, but then {loser.he} became <sad>, and {winner} won.",
    )
    tale.say(
        "{winner} got the {thing}, and {loser} was [<sad>|<glad>] and [ate <meal>|went home with <item>].",
        "so {winner} won the {thing}, but {winner.he} <pace> [shared it with|gave it to|lent it to] {loser}.",
    )


def storm(tale: Tale) -> None:
    """Find shelter, pass the time, walk home."""
    tale.know(spot=tale.pick(tale.spots))
    tale.say(
        "[suddenly|at noon|after <number> minutes], a storm came, and {hero} <pace> [hid|sat down|waited] {spot}.",
        '"A storm is coming!" <said> {friend} <tone>, and they hid {spot} with [<somebody>|<item>].',
    )
    tale.say(
        "to pass the time, they ate <meal> and [played <game>|counted <item>].",
        "{friend} was <sad>, so {hero} told {friend.him} a story about <somebody> and <somebody>.",
        "{hero} had [<meal>|<item>] with {hero.him}, and {friend} was <glad>.",
    )
    tale.say(
        "when the storm was over, they saw [a rainbow|<somebody>] and <number> <color> birds {there}.",
        "after <number> hours, the [rain stopped|wind was still|sky was clear again], and they <went> home <pace>.",
        "then {hero.his} {elder} came with a <color> [lantern|umbrella|wagon|<clothing>] and took them home.",
    )


def planting(tale: Tale) -> None:
    """Plant, wait, harvest."""
    one, many = tale.pick(SEEDS)
    tale.know(one=one, many=many, count="<number>")
    tale.say(
        "{hero.he} and {friend} the {friend.kind} <pace> [put|planted] a {one} seed beside <item>.",
        "{friend} the {friend.kind} sold {hero.him} a {one} seed for [<item>|<meal>].",
        '"What will grow from this seed?" asked {friend} the {friend.kind} and gave {hero} a {one} seed.',
    )
    tale.say(
        "every <hour> {hero.he} <pace> gave it water, but [nothing came|{hero.he} saw only <somebody>].",
        "for <number> [days|weeks], {hero} waited <pace>, and {friend} came with [<item>|<meal>].",
        "{weather}, but {hero} came back every <hour> with [{friend}|<somebody>].",
    )
    tale.say(
        "[in <season>|one <weekday>|after <number> weeks], there were {count} [<color>|big|pretty] {many} {there}.",
        '"Look, {friend}, {count} <color> {many}!" <said> {hero} <tone>.',
    )
    tale.say(
        "{hero} gave [some|half] of the {count} {many} to {friend} and [sold|showed] the rest to <somebody>.",
        "with the {count} {many}, {hero.his} {elder} paid <somebody> for <item> and <item>.",
    )


Scene = Callable[[Tale], None]
PLOTS: tuple[tuple[Scene, ...], ...] = (
    (opening, going, take_tool, use_tool, thanks, ending),
    (opening, take_tool, going, use_tool, thanks, supper),
    (opening, lose_thing, supper, ending),
    (opening, going, share, thanks, ending),
    (opening, going, quarrel, supper, ending),
    (opening, gift, thanks, supper, ending),
    (opening, courage, supper, ending),
    (opening, going, lost_one, supper, ending),
    (opening, going, race, supper, ending),
    (opening, going, meeting, storm, ending),
    (opening, planting, thanks, ending),
)


def stories(seed: int) -> Iterator[str]:
    """Stories without end, each one paragraph; the same seed tells the same stories."""
    rng = random.Random(seed)
    while True:
        tale = Tale(rng)
        draw_facts(tale)
        for scene in tale.pick(PLOTS):
            scene(tale)
        yield " ".join(tale.sentences)


def text(seed: int, characters: int) -> str:
    """Whole stories with a blank line between them, at least this many characters."""
    told: list[str] = []
    length = 0
    for story in stories(seed):
        if length >= characters:
            break
        told.append(story)
        length += len(story)
    return "\n\n".join(told)
