"""The words of the embedded data set: concepts, their synonyms, what they are kinds of, and which go together.

Every table is nested by meaning, the way a generalisation climbs: a boy is a child is a person. A string lists the
synonyms of one concept. No word belongs to two concepts of the same table, so that the words of a sentence say which
concepts it is about. Dictionaries and tuples only: their order is part of the data set.
"""

from __future__ import annotations

# kind of being -> (its own words, {concept: words})
PEOPLE: dict[str, tuple[str, dict[str, str]]] = {
    "child": (
        "child, kid, youngster",
        {
            "boy": "boy, lad, schoolboy",
            "girl": "girl, lass, schoolgirl",
            "toddler": "toddler, infant",
        },
    ),
    "adult": (
        "adult, grown-up",
        {
            "man": "man, gentleman, fellow",
            "woman": "woman, lady",
            "grandmother": "grandmother, granny",
            "grandfather": "grandfather, grandpa",
        },
    ),
    "worker": (
        "worker, labourer",
        {
            "builder": "builder, bricklayer",
            "carpenter": "carpenter, woodworker, joiner",
            "farmer": "farmer, grower",
            "mechanic": "mechanic, repairman",
            "chef": "chef, cook",
            "waiter": "waiter, server",
            "tailor": "tailor, dressmaker",
        },
    ),
    "performer": (
        "performer, entertainer",
        {
            "singer": "singer, vocalist",
            "dancer": "dancer, ballerina",
            "clown": "clown, jester",
            "magician": "magician, conjurer, illusionist",
            "actor": "actor, thespian",
        },
    ),
    "medic": (
        "medic, health worker",
        {
            "doctor": "doctor, physician",
            "nurse": "nurse, carer",
            "surgeon": "surgeon",
            "dentist": "dentist",
        },
    ),
    "officer": (
        "officer, person in uniform",
        {
            "policeman": "policeman, cop, constable",
            "soldier": "soldier, trooper",
            "guard": "guard, watchman, sentry",
            "firefighter": "firefighter, fireman",
        },
    ),
    "athlete": (
        "athlete, sportsman",
        {
            "runner": "runner, sprinter",
            "boxer": "boxer, prizefighter",
            "footballer": "footballer, soccer player",
            "cyclist": "cyclist, bike rider",
            "gymnast": "gymnast, acrobat",
        },
    ),
    "scholar": (
        "scholar, academic",
        {
            "teacher": "teacher, instructor, tutor",
            "scientist": "scientist, researcher",
            "professor": "professor, lecturer",
            "student": "student, pupil",
        },
    ),
}
PERSON = "person, human being, individual"

ANIMALS: dict[str, tuple[str, dict[str, str]]] = {
    "pet": (
        "pet, house pet",
        {
            "dog": "dog, hound, puppy",
            "cat": "cat, kitten, tomcat",
            "rabbit": "rabbit, bunny",
        },
    ),
    "farm animal": (
        "farm animal, domestic animal",
        {
            "horse": "horse, pony, stallion",
            "cow": "cow, heifer",
            "goat": "goat",
            "sheep": "sheep, ewe",
            "pig": "pig, hog, piglet",
            "donkey": "donkey, mule",
        },
    ),
    "wild animal": (
        "wild animal, beast",
        {
            "bear": "bear, grizzly",
            "wolf": "wolf",
            "fox": "fox, vixen",
            "lion": "lion, big cat",
            "monkey": "monkey, ape",
            "elephant": "elephant",
        },
    ),
    "bird": (
        "bird, feathered animal",
        {
            "eagle": "eagle",
            "duck": "duck, mallard",
            "pigeon": "pigeon, dove",
            "crow": "crow, raven",
            "hen": "hen, chicken",
        },
    ),
}
ANIMAL = "animal, creature"

# "~" marks a word that takes no article of its own: "some bread".
OBJECTS: dict[str, tuple[str, dict[str, str]]] = {
    "vehicle": (
        "vehicle, means of transport",
        {
            "car": "car, automobile, sedan",
            "bicycle": "bicycle, bike, cycle",
            "truck": "truck, lorry",
            "motorcycle": "motorcycle, motorbike",
            "boat": "boat, rowing boat",
            "wagon": "wagon, cart",
            "tractor": "tractor",
        },
    ),
    "musical instrument": (
        "musical instrument, instrument",
        {
            "guitar": "guitar, acoustic guitar",
            "violin": "violin, fiddle",
            "piano": "piano, grand piano",
            "drum": "drum, snare drum",
            "flute": "flute, wooden flute",
            "trumpet": "trumpet, bugle",
            "harp": "harp",
        },
    ),
    "food": (
        "~food, ~nourishment",
        {
            "bread": "~bread, loaf, baguette",
            "apple": "apple",
            "cake": "cake, sponge cake",
            "soup": "~soup, ~broth, ~stew",
            "meat": "~meat, steak, ~beef",
            "cheese": "~cheese, ~cheddar",
            "potato": "potato, spud",
        },
    ),
    "drink": (
        "drink, beverage",
        {
            "coffee": "~coffee, espresso",
            "tea": "~tea, ~green tea",
            "juice": "~juice, ~fruit juice",
            "beer": "~beer, ~ale",
            "wine": "~wine, ~claret",
            "milk": "~milk",
        },
    ),
    "garment": (
        "garment, piece of clothing",
        {
            "coat": "coat, jacket, anorak",
            "hat": "hat, cap, bonnet",
            "shirt": "shirt, blouse",
            "dress": "dress, gown",
            "scarf": "scarf, shawl",
            "sweater": "sweater, pullover, jersey",
        },
    ),
    "tool": (
        "tool, implement",
        {
            "hammer": "hammer, mallet",
            "shovel": "shovel, spade",
            "broom": "broom",
            "ladder": "ladder, stepladder",
            "axe": "axe, hatchet",
            "wrench": "wrench, spanner",
        },
    ),
    "toy": (
        "toy, plaything",
        {
            "ball": "ball, football",
            "doll": "doll, rag doll",
            "kite": "kite",
            "teddy": "teddy bear, stuffed animal",
            "balloon": "balloon",
        },
    ),
    "text": (
        "text, piece of writing",
        {
            "book": "book, novel, paperback",
            "newspaper": "newspaper, daily paper",
            "letter": "letter, note, message",
            "poem": "poem, verse",
            "report": "report, article",
            "magazine": "magazine, journal",
        },
    ),
    "container": (
        "container, receptacle",
        {
            "box": "box, crate, carton",
            "bag": "bag, sack, pouch",
            "basket": "basket, hamper",
            "bucket": "bucket, pail",
            "suitcase": "suitcase, trunk",
            "bottle": "bottle, flask",
        },
    ),
    "piece of furniture": (
        "piece of furniture, furnishing",
        {
            "chair": "chair, seat",
            "table": "table, desk",
            "sofa": "sofa, couch",
            "bed": "bed, cot",
            "cupboard": "cupboard, wardrobe, cabinet",
            "shelf": "shelf, bookcase",
        },
    ),
    "device": (
        "device, gadget",
        {
            "phone": "phone, telephone, handset",
            "camera": "camera",
            "computer": "computer, laptop",
            "radio": "radio, wireless",
            "television": "television, TV set",
            "clock": "clock, alarm clock",
        },
    ),
    "structure": (
        "structure, construction",
        {
            "fence": "fence, railing",
            "wall": "wall, brick wall",
            "house": "house, cottage, bungalow",
            "shed": "shed, hut, cabin",
            "gate": "gate, garden gate",
        },
    ),
    "picture": (
        "picture, image",
        {
            "portrait": "portrait, likeness",
            "landscape": "landscape, country scene",
            "sketch": "sketch, doodle, drawing",
            "poster": "poster, placard",
        },
    ),
    "plant": (
        "plant, ~greenery",
        {
            "flower": "flower, blossom",
            "rose": "rose",
            "tree": "tree, sapling",
            "bush": "bush, shrub, hedge",
        },
    ),
}
OBJECT = "thing, object, item"

_ANIMATE = "person animal"
_GOODS = "vehicle|musical instrument|garment|tool|toy|text|container|piece of furniture|device|picture|plant"

# kind of action -> (its own words, {concept: (words, who can do it, what it is done to)}). A verb is given in its base
# form, with the preposition that goes with it; what it is done to is empty for an intransitive verb.
ACTIONS: dict[str, tuple[str, dict[str, tuple[str, str, str]]]] = {
    "improve": (
        "work on, attend to",
        {
            "repair": (
                "repair, fix, mend",
                "person",
                "vehicle|musical instrument|piece of furniture|device|structure|toy|garment",
            ),
            "clean": ("clean, wash, scrub", "person", "vehicle|container|piece of furniture|tool|garment|structure"),
            "paint": ("paint, decorate, varnish", "person", "structure|piece of furniture|vehicle|toy"),
            "build": ("build, construct, assemble", "person", "structure|piece of furniture|toy|vehicle"),
        },
    ),
    "move": (
        "move, shift",
        {
            "carry": (
                "carry, haul, lug",
                "person",
                "container|piece of furniture|tool|musical instrument|plant|device|picture",
            ),
            "push": ("push, shove", "person", "vehicle|piece of furniture|container"),
            "pull": ("pull, drag, tow", "person animal", "vehicle|container"),
            "lift": ("lift, raise, hoist", "person", "container|tool|piece of furniture|toy"),
            "throw": ("throw, toss, hurl", "person", "toy|container|tool|garment"),
        },
    ),
    "consume": (
        "consume, swallow",
        {
            "eat": ("eat, devour, munch", "person animal", "food"),
            "taste": ("taste, sample, try", "person", "food|drink"),
            "drink": ("drink, sip, gulp down", "person", "drink"),
        },
    ),
    "prepare": (
        "prepare, fix up",
        {
            "cook": ("cook, boil, heat up", "person", "food"),
            "cut": ("chop, slice, carve", "person", "food"),
            "pour": ("pour, serve, dish up", "person", "drink|food"),
        },
    ),
    "acquire": (
        "acquire, get hold of, obtain",
        {
            "buy": ("buy, purchase, pay for", "person", f"{_GOODS}|food|drink"),
            "steal": ("steal, pinch, make off with", "person", f"{_GOODS}|food"),
            "find": ("find, discover, come across", "person", _GOODS),
            "borrow": ("borrow, rent", "person", "vehicle|musical instrument|tool|text|device"),
        },
    ),
    "part with": (
        "part with, get rid of",
        {
            "sell": ("sell, trade", "person", f"{_GOODS}|food|drink"),
            "throw away": ("throw away, discard, dump", "person", _GOODS),
            "give away": ("give away, donate", "person", f"{_GOODS}|food"),
        },
    ),
    "damage": (
        "damage, ruin",
        {
            "break": ("break, smash, shatter", "person", "device|container|toy|musical instrument|piece of furniture"),
            "burn": ("burn, set fire to", "person", "text|picture|structure|piece of furniture|garment"),
            "tear": ("tear up, rip apart, shred", "person animal", "text|picture|garment"),
            "scratch": ("scratch, scrape", "person animal", "vehicle|piece of furniture|picture|structure"),
        },
    ),
    "perceive": (
        "notice, pay attention to",
        {
            "watch": ("watch, observe, look at", _ANIMATE, f"person|animal|{_GOODS}|structure"),
            "smell": ("smell, sniff", _ANIMATE, "food|plant|garment"),
            "listen to": ("listen to, listen in on", _ANIMATE, "person|musical instrument"),
        },
    ),
    "study": (
        "work with, concentrate on",
        {
            "read": ("read, leaf through, browse", "person", "text"),
            "write": ("write, compose, pen", "person", "text"),
            "copy": ("copy, duplicate, reproduce", "person", "text|picture"),
        },
    ),
    "make art": (
        "portray, depict",
        {
            "draw": ("draw, sketch, outline", "person", "person|animal|vehicle|plant|structure"),
            "photograph": ("photograph, take a picture of, film", "person", f"person|animal|{_GOODS}|structure"),
        },
    ),
    "operate": (
        "use, handle, operate",
        {
            "play": ("play, perform on, practise on", "person", "musical instrument"),
            "drive": ("drive, steer", "person", "vehicle"),
            "switch off": ("switch off, turn off", "person", "device"),
            "tune": ("tune, adjust", "person", "musical instrument|device"),
        },
    ),
    "deal with": (
        "meet, encounter",
        {
            "greet": ("greet, welcome, say hello to", "person", "person"),
            "help": ("help, assist, aid", "person", "person|animal"),
            "hug": ("hug, embrace, cuddle", "person", "person|animal"),
            "thank": ("thank, show gratitude to", "person", "person"),
            "interview": ("interview, question", "person", "person"),
        },
    ),
    "trouble": (
        "bother, disturb, harass",
        {
            "chase": ("chase, pursue, run after", _ANIMATE, "person|animal"),
            "attack": ("attack, assault", _ANIMATE, "person|animal"),
            "scare": ("scare, frighten, startle", _ANIMATE, "person|animal"),
            "tease": ("tease, mock, make fun of", "person", "person|animal"),
            "insult": ("insult, curse", "person", "person"),
        },
    ),
    "care for": (
        "care for, look after",
        {
            "feed": ("feed, nourish", "person", "animal"),
            "stroke": ("stroke, pet, caress", "person", "animal"),
            "groom": ("groom, brush", "person", "animal"),
        },
    ),
    "grow": (
        "tend, cultivate",
        {
            "plant": ("plant", "person", "plant"),
            "water": ("water, irrigate, sprinkle", "person", "plant"),
            "prune": ("prune, trim", "person", "plant"),
        },
    ),
    "go": (
        "get about, get around",
        {
            "run": ("run, sprint, dash around", _ANIMATE, ""),
            "walk": ("walk, stroll, wander around", _ANIMATE, ""),
            "jump": ("jump, leap, hop around", _ANIMATE, ""),
            "climb": ("climb, clamber", _ANIMATE, ""),
            "crawl": ("crawl, creep", _ANIMATE, ""),
        },
    ),
    "rest": (
        "rest, relax",
        {
            "sleep": ("sleep, nap, doze", _ANIMATE, ""),
            "sit": ("sit, sit down", _ANIMATE, ""),
            "lie": ("lie down, stretch out", _ANIMATE, ""),
        },
    ),
    "sound": (
        "make a noise, make a sound",
        {
            "sing": ("sing, croon", "person", ""),
            "shout": ("shout, yell, scream", "person", ""),
            "laugh": ("laugh, giggle, chuckle", "person", ""),
            "cry": ("cry, weep, sob", "person", ""),
            "talk": ("talk, chat, speak", "person", ""),
        },
    ),
    "exercise": (
        "exercise, work out",
        {
            "dance": ("dance, waltz", "person", ""),
            "swim": ("swim, bathe", _ANIMATE, ""),
            "skate": ("skate", "person", ""),
            "box": ("fight, brawl", "person", ""),
        },
    ),
}
PLACES: dict[str, tuple[str, dict[str, str]]] = {
    "indoors": (
        "indoors, inside, inside a building",
        {
            "kitchen": "in the kitchen, by the stove",
            "bedroom": "in the bedroom, in the sleeping quarters",
            "garage": "in the garage, in the workshop",
            "shop": "in the shop, in a store, at the supermarket",
            "school": "at school, in the classroom",
            "hospital": "at the hospital, in a clinic",
            "restaurant": "in a restaurant, in a café, at the diner",
            "library": "in the library, in the reading room",
            "museum": "in a museum, in an art gallery",
            "theatre": "in the theatre, on the stage",
            "office": "in the office, at headquarters",
            "gym": "at the gym, in the fitness centre",
            "church": "in the church, in a chapel",
        },
    ),
    "outdoors": (
        "outdoors, outside, in the open air",
        {
            "park": "in the park, on the lawn",
            "street": "in the street, on the road, on the pavement",
            "forest": "in the forest, in the woods",
            "field": "in a field, in the meadow",
            "farm": "on the farm, in the farmyard",
            "market": "at the market, in the bazaar",
            "mountain": "on a hill, on the mountain",
            "station": "at the station, on the platform",
            "garden": "in the garden, in the backyard",
            "desert": "in the desert, among the dunes",
        },
    ),
    "by the water": (
        "near the water, by the water",
        {
            "beach": "on the beach, at the seaside, on the shore",
            "river": "by the river, beside a stream",
            "lake": "by the lake, next to a pond",
            "harbour": "in the harbour, at the port, on the pier",
        },
    ),
}
SOMEWHERE = "somewhere"

TIMES: dict[str, tuple[str, dict[str, str]]] = {
    "day": (
        "during the day, in the daytime",
        {
            "morning": "in the morning, at dawn, at sunrise",
            "noon": "at noon, at midday, around lunchtime",
            "afternoon": "in the afternoon, after lunch",
        },
    ),
    "late": (
        "late in the day",
        {
            "evening": "in the evening, at dusk, at sunset",
            "night": "at night, after dark, at midnight",
        },
    ),
    "season": (
        "at that time of year",
        {
            "winter": "in winter, in the cold season, in January",
            "summer": "in summer, in the hot season, in July",
            "autumn": "in autumn, at harvest time",
            "spring": "in spring, at Easter",
        },
    ),
}

# Concepts of one dimension exclude each other: a contradiction replaces one by another.
MANNERS: dict[str, dict[str, str]] = {
    "speed": {"fast": "quickly, rapidly, swiftly", "slow": "slowly, unhurriedly, leisurely"},
    "noise": {"quiet": "quietly, silently, noiselessly", "loud": "loudly, noisily"},
    "care": {"careful": "carefully, cautiously", "careless": "carelessly, clumsily"},
    "mood": {"glad": "happily, cheerfully, joyfully", "sad": "sadly, gloomily", "angry": "angrily, furiously"},
}

ANIMATE_ATTRIBUTES: dict[str, dict[str, str]] = {
    "age": {"old": "old, elderly, aged", "young": "young, youthful"},
    "height": {"tall": "tall, lanky", "short": "short, stocky"},
    "weight": {"fat": "fat, plump, chubby", "thin": "thin, slender, skinny"},
    "energy": {"tired": "tired, weary, exhausted", "lively": "lively, energetic"},
    "courage": {"brave": "brave, fearless", "timid": "timid, shy, anxious"},
    "hunger": {"hungry": "hungry, starving", "sated": "well-fed, satisfied"},
    "strength": {"strong": "strong, muscular, powerful", "weak": "weak, frail, feeble"},
    "character": {"friendly": "friendly, kind, gentle", "nasty": "nasty, hostile"},
}

OBJECT_ATTRIBUTES: dict[str, dict[str, str]] = {
    "colour": {
        "red": "red, scarlet",
        "blue": "blue, navy",
        "green": "green, emerald",
        "black": "black, jet-black",
        "white": "white, snow-white",
        "yellow": "yellow, golden",
    },
    "size": {"big": "big, large, huge", "small": "small, little, tiny"},
    "novelty": {"old": "ancient, antique", "new": "new, brand-new, modern"},
    "price": {"cheap": "cheap, inexpensive", "expensive": "expensive, costly, pricey"},
    "beauty": {"beautiful": "beautiful, pretty, lovely", "ugly": "ugly, hideous"},
    "cleanliness": {"dirty": "dirty, filthy, grimy", "clean": "spotless, immaculate"},
}

FOOD_ATTRIBUTES: dict[str, dict[str, str]] = {
    "temperature": {"hot": "hot, steaming", "cold": "cold, chilled"},
    "taste": {"tasty": "tasty, delicious, yummy", "awful": "awful, disgusting"},
    "freshness": {"fresh": "fresh, home-made", "stale": "stale, spoiled"},
}

COUNTS: dict[str, str] = {"two": "two, a pair of, a couple of", "several": "several, a group of, a few"}

# What a sentence can be wrapped in without a change of what it is about; "{}" is a whole clause.
CLAUSE_FRAMES = (
    "it seems that {}",
    "as you can see, {}",
    "in this picture, {}",
    "according to a witness, {}",
    "the report says that {}",
    "it is clear that {}",
    "people say that {}",
    "we are told that {}",
    "right now, {}",
    "there is no doubt that {}",
    "somebody has noticed that {}",
    "{}, as far as anyone can tell",
    "{}, or so it appears",
    "{}, as the caption explains",
)

# ... and "{}" is a noun phrase with a participle: "a boy eating an apple".
NOUN_FRAMES = (
    "there {be} {}",
    "this is a snapshot of {}",
    "the photo shows {}",
    "here we see {}",
    "the scene is of {}",
    "the artist has depicted {}",
    "what we have here {be} {}",
    "in the foreground there {be} {}",
    "the video is about {}",
)

# Verb forms that the rules of English spelling do not give.
IRREGULAR_PARTICIPLES = {
    "break": "broken", "build": "built", "buy": "bought", "come": "come", "draw": "drawn", "drink": "drunk",
    "drive": "driven", "eat": "eaten", "feed": "fed", "find": "found", "get": "got", "give": "given",
    "make": "made", "meet": "met", "pay": "paid", "read": "read", "run": "run", "say": "said", "sell": "sold",
    "set": "set", "show": "shown", "steal": "stolen", "take": "taken", "tear": "torn", "throw": "thrown",
    "write": "written",
}  # fmt: skip
IRREGULAR_PLURALS = {
    "child": "children", "person": "people", "person in uniform": "people in uniform", "sheep": "sheep",
    "wolf": "wolves",
}  # fmt: skip
# Verbs with a noun inside: nobody "is being said hello to".
NEVER_PASSIVE = ("say hello to", "set fire to", "show gratitude to", "take a picture of", "pay attention to")
