"""Common English words. RULER's keys are pairs of an adjective and a noun; its common words are any of them.

RULER uses the package wonderwords; this list is our own. No word is part of another, because an answer counts if the
generated text contains it.
"""

from __future__ import annotations

ADJECTIVES = """
absent ancient angry awake bitter blind blunt bold brave brief bright broad calm careful cheap clean clever cloudy
clumsy cold common crisp cruel curious damp daring dark deep dense dirty distant double dry dull eager early easy
elegant empty equal exact fair faint famous fierce final firm flat foreign formal fragile fresh friendly full funny
gentle giant glad golden grand grateful great happy harsh heavy hidden hollow honest huge humble hungry idle jolly
keen kind large lazy light little lively local lonely loyal lucky massive mild modern modest muddy mute narrow neat
nervous noble noisy odd open pale patient pleasant polite poor proud pure quick quiet rapid rare ready rich rigid
robust rough round royal rude rusty sad safe salty scarce secret serious shallow sharp shiny shy silent silly simple
sincere slim slow small smooth soft solid sour stale steady steep stern stiff strange strict strong sturdy sudden
sunny sweet swift tall tame tender thick thin tidy tiny tired tough true ugly uneven upper urban useful usual vague
vast violent vivid warm weak weary wet wide wild wise witty wooden worthy young
"""

NOUNS = """
acorn advice anchor ankle apple apron artist atlas attic author autumn award bakery balcony ball banner barn barrel
basket beach beaver belt bench bicycle biscuit blanket blossom bottle bottom branch bread breeze brick bridge broom
brother bucket bubble bullet butter button cabin cabbage cactus camera campus candle canyon captain carbon carpet
carrot castle cattle ceiling cellar century cereal chain chalk cheese cherry chicken chimney church circle citizen
clock coffee collar colony comet compass copper cotton cousin cradle crayon cricket crystal culture cupboard curtain
cushion dagger dancer daughter desert diamond dinner doctor dolphin donkey dragon drawer drum eagle earth editor elbow
elephant emerald empire engine evening fabric factory falcon farmer father feather fence ferry fiddle finger flame
flute forest fountain fossil frost galaxy garage garden garlic giraffe glacier glove goblet granite grape gravel
guitar hammer harbor harvest helmet hermit hockey honey horizon hospital hunter iceberg infant insect island ivory
jacket jaguar jewel journey judge jungle kettle kingdom kitchen kitten knight ladder lagoon lantern lawyer leather
lemon letter library lizard lobster locket lumber magnet mammal mango marble market meadow medal melody merchant
meteor mirror monkey monster morning mosaic mother motor mountain museum mustard napkin needle nephew nickel notebook
novel number nutmeg oasis ocean office olive onion orange orchard orchid oven oyster paddle painter palace panther
paper parrot pastry peanut pebble pencil pepper piano pigeon pillow pilot pirate pistol planet plaster pocket poet
police pony potato pottery powder prairie prince prison pumpkin puppet purse puzzle pyramid quarry quilt rabbit
raccoon radio raft railway raven receipt ribbon riddle river robin rocket rooster rubber sailor salmon sandal saucer
scarf school scissors season senate shadow shelter sheriff shovel silver singer sister soldier spider sponge spoon
squirrel stable statue stomach storm stove summer surgeon tailor teacher temple tennis theater thimble thunder ticket
tiger timber tomato tornado tower tractor trumpet tunnel turkey turnip turtle uncle uniform vacuum valley vampire
vehicle velvet vessel village vinegar violin visitor volcano wagon wallet walnut weapon weasel whisper whistle widow
willow window winter wizard wolf workshop yacht zebra
"""

VERBS = """
accept achieve admire agree amuse announce argue arrive attack avoid begin behave belong borrow bounce breathe bring
build bury carry catch choose climb collect compare confess consider continue count create cross decide defend deliver
deny depend describe destroy develop discuss divide drink educate enjoy escape examine exist expand explain explore
fasten fetch follow forgive gather grab guess happen hesitate hurry imagine improve include inform invent invite join
knock launch learn listen manage measure mention obey observe obtain offer permit polish pour prefer prepare pretend
promise protect publish punish push reach realize receive reduce refuse regret reject remain remember remove repair
repeat reply request rescue respect return reveal scatter scream search select settle shout shrink solve spell squeeze
stretch suffer suggest supply support suppose survive thank throw translate travel tremble unite vanish wander watch
wonder wrestle write
"""

_ADJECTIVES, _NOUNS = ADJECTIVES.split(), NOUNS.split()
WORDS = [*_ADJECTIVES, *_NOUNS, *VERBS.split()]
PAIRS = len(_ADJECTIVES) * len(_NOUNS)  # number of pairs of an adjective and a noun


def pair(number: int) -> str:
    """Pair `number`, from 0 to PAIRS − 1, as `golden-acorn`."""
    adjective, noun = divmod(number, len(_NOUNS))
    return f"{_ADJECTIVES[adjective]}-{_NOUNS[noun]}"
