"""The words of the embedded data set: concepts, their synonyms, what they are kinds of, and which go together.

A line lists the synonyms of one concept; indented lines are kinds of the line above them, so that a generalisation
climbs: a boy is a child is a person. No word belongs to two concepts of one table: the words of a sentence say which
concepts it is about. The order of the lines is part of the data set.
"""

from __future__ import annotations

import re

# Before the colon: the kind, by which ACTIONS refers to it.
PEOPLE = """
child: child, kid, youngster
    boy, lad, schoolboy
    girl, lass, schoolgirl
    toddler, infant
adult: adult, grown-up
    man, gentleman, fellow
    woman, lady
    grandmother, granny
    grandfather, grandpa
worker: worker, labourer
    builder, bricklayer
    carpenter, woodworker, joiner
    farmer, grower
    mechanic, repairman
    chef, cook
    waiter, server
    tailor, dressmaker
performer: performer, entertainer
    singer, vocalist
    dancer, ballerina
    clown, jester
    magician, conjurer, illusionist
    actor, thespian
medic: medic, health worker
    doctor, physician
    nurse, carer
    surgeon
    dentist
officer: officer, person in uniform
    policeman, cop, constable
    soldier, trooper
    guard, watchman, sentry
    firefighter, fireman
athlete: athlete, sportsman
    runner, sprinter
    boxer, prizefighter
    footballer, soccer player
    cyclist, bike rider
    gymnast, acrobat
scholar: scholar, academic
    teacher, instructor, tutor
    scientist, researcher
    professor, lecturer
    student, pupil
"""
PERSON = "person, human being, individual"

ANIMALS = """
pet: pet, house pet
    dog, hound, puppy
    cat, kitten, tomcat
    rabbit, bunny
farm animal: farm animal, domestic animal
    horse, pony, stallion
    cow, heifer
    goat
    sheep, ewe
    pig, hog, piglet
    donkey, mule
wild animal: wild animal, beast
    bear, grizzly
    wolf
    fox, vixen
    lion, big cat
    monkey, ape
    elephant
bird: bird, feathered animal
    eagle
    duck, mallard
    pigeon, dove
    crow, raven
    hen, chicken
"""
ANIMAL = "animal, creature"

# "~" marks a word that is not counted: "some bread".
OBJECTS = """
vehicle: vehicle, means of transport
    car, automobile, sedan
    bicycle, bike, cycle
    truck, lorry
    motorcycle, motorbike
    boat, rowing boat
    wagon, cart
    tractor
musical instrument: musical instrument, instrument
    guitar, acoustic guitar
    violin, fiddle
    piano, grand piano
    drum, snare drum
    flute, wooden flute
    trumpet, bugle
    harp
food: ~food, ~nourishment
    ~bread, loaf, baguette
    apple
    cake, sponge cake
    ~soup, ~broth, ~stew
    ~meat, steak, ~beef
    ~cheese, ~cheddar
    potato, spud
drink: drink, beverage
    ~coffee, espresso
    ~tea, ~green tea
    ~juice, ~fruit juice
    ~beer, ~ale
    ~wine, ~claret
    ~milk
garment: garment, piece of clothing
    coat, jacket, anorak
    hat, cap, bonnet
    shirt, blouse
    dress, gown
    scarf, shawl
    sweater, pullover, jersey
tool: tool, implement
    hammer, mallet
    shovel, spade
    broom
    ladder, stepladder
    axe, hatchet
    wrench, spanner
toy: toy, plaything
    ball, football
    doll, rag doll
    kite
    teddy bear, stuffed animal
    balloon
text: text, piece of writing
    book, novel, paperback
    newspaper, daily paper
    letter, note, message
    poem, verse
    report, article
    magazine, journal
container: container, receptacle
    box, crate, carton
    bag, sack, pouch
    basket, hamper
    bucket, pail
    suitcase, trunk
    bottle, flask
piece of furniture: piece of furniture, furnishing
    chair, seat
    table, desk
    sofa, couch
    bed, cot
    cupboard, wardrobe, cabinet
    shelf, bookcase
device: device, gadget
    phone, telephone, handset
    camera
    computer, laptop
    radio, wireless
    television, TV set
    clock, alarm clock
structure: structure, construction
    fence, railing
    wall, brick wall
    house, cottage, bungalow
    shed, hut, cabin
    gate, garden gate
picture: picture, image
    portrait, likeness
    landscape, country scene
    sketch, doodle, drawing
    poster, placard
plant: plant, ~greenery
    flower, blossom
    rose
    tree, sapling
    bush, shrub, hedge
"""
OBJECT = "thing, object, item"

PLACES = """
indoors: indoors, inside, inside a building
    in the kitchen, by the stove
    in the bedroom, in the sleeping quarters
    in the garage, in the workshop
    in the shop, in a store, at the supermarket
    at school, in the classroom
    at the hospital, in a clinic
    in a restaurant, in a café, at the diner
    in the library, in the reading room
    in a museum, in an art gallery
    in the theatre, on the stage
    in the office, at headquarters
    at the gym, in the fitness centre
    in the church, in a chapel
outdoors: outdoors, outside, in the open air
    in the park, on the lawn
    in the street, on the road, on the pavement
    in the forest, in the woods
    in a field, in the meadow
    on the farm, in the farmyard
    at the market, in the bazaar
    on a hill, on the mountain
    at the station, on the platform
    in the garden, in the backyard
    in the desert, among the dunes
by the water: near the water, by the water
    on the beach, at the seaside, on the shore
    by the river, beside a stream
    by the lake, next to a pond
    in the harbour, at the port, on the pier
"""
SOMEWHERE = "somewhere"

TIMES = """
day: during the day, in the daytime
    in the morning, at dawn, at sunrise
    at noon, at midday, around lunchtime
    in the afternoon, after lunch
late: late in the day
    in the evening, at dusk, at sunset
    at night, after dark, at midnight
season: at that time of year
    in winter, in the cold season, in January
    in summer, in the hot season, in July
    in autumn, at harvest time
    in spring, at Easter
"""
SOMETIME = "at some point"

# What can be carried off, bought or looked at.
GOODS = (
    "vehicle",
    "musical instrument",
    "garment",
    "tool",
    "toy",
    "text",
    "container",
    "piece of furniture",
    "device",
    "picture",
    "plant",
)

# A verb is given in its base form, with the preposition that goes with it. Indented: who does it > what it is done to;
# the latter is empty for an intransitive verb. "goods" stands for all of GOODS.
ACTIONS = """
work on, attend to
    repair, fix, mend: person > vehicle, musical instrument, piece of furniture, device, structure, toy, garment
    clean, wash, scrub: person > vehicle, container, piece of furniture, tool, garment, structure
    paint, decorate, varnish: person > structure, piece of furniture, vehicle, toy
    build, construct, assemble: person > structure, piece of furniture, toy, vehicle
move, shift
    carry, haul, lug: person > container, piece of furniture, tool, musical instrument, plant, device, picture
    push, shove: person > vehicle, piece of furniture, container
    pull, drag, tow: person, animal > vehicle, container
    lift, raise, hoist: person > container, tool, piece of furniture, toy
    throw, toss, hurl: person > toy, container, tool, garment
consume, swallow
    eat, devour, munch: person, animal > food
    taste, sample, try: person > food, drink
    drink, sip, gulp down: person > drink
prepare, fix up
    cook, boil, heat up: person > food
    chop, slice, carve: person > food
    pour, serve, dish up: person > drink, food
acquire, get hold of, obtain
    buy, purchase, pay for: person > goods, food, drink
    steal, pinch, make off with: person > goods, food
    find, discover, come across: person > goods
    borrow, rent: person > vehicle, musical instrument, tool, text, device
part with, get rid of
    sell, trade: person > goods, food, drink
    throw away, discard, dump: person > goods
    give away, donate: person > goods, food
damage, ruin
    break, smash, shatter: person > device, container, toy, musical instrument, piece of furniture
    burn, set fire to: person > text, picture, structure, piece of furniture, garment
    tear up, rip apart, shred: person, animal > text, picture, garment
    scratch, scrape: person, animal > vehicle, piece of furniture, picture, structure
notice, pay attention to
    watch, observe, look at: person, animal > person, animal, goods, structure
    smell, sniff: person, animal > food, plant, garment
    listen to, listen in on: person, animal > person, musical instrument
work with, concentrate on
    read, leaf through, browse: person > text
    write, compose, pen: person > text
    copy, duplicate, reproduce: person > text, picture
portray, depict
    draw, sketch, outline: person > person, animal, vehicle, plant, structure
    photograph, take a picture of, film: person > person, animal, goods, structure
use, handle, operate
    play, perform on, practise on: person > musical instrument
    drive, steer: person > vehicle
    switch off, turn off: person > device
    tune, adjust: person > musical instrument, device
meet, encounter
    greet, welcome, say hello to: person > person
    help, assist, aid: person > person, animal
    hug, embrace, cuddle: person > person, animal
    thank, show gratitude to: person > person
    interview, question: person > person
bother, disturb, harass
    chase, pursue, run after: person, animal > person, animal
    attack, assault: person, animal > person, animal
    scare, frighten, startle: person, animal > person, animal
    tease, mock, make fun of: person > person, animal
    insult, curse: person > person
care for, look after
    feed, nourish: person > animal
    stroke, pet, caress: person > animal
    groom, brush: person > animal
tend, cultivate
    plant: person > plant
    water, irrigate, sprinkle: person > plant
    prune, trim: person > plant
get about, get around
    run, sprint, dash around: person, animal >
    walk, stroll, wander around: person, animal >
    jump, leap, hop around: person, animal >
    climb, clamber: person, animal >
    crawl, creep: person, animal >
rest, relax
    sleep, nap, doze: person, animal >
    sit, sit down: person, animal >
    lie down, stretch out: person, animal >
make a noise, make a sound
    sing, croon: person >
    shout, yell, scream: person >
    laugh, giggle, chuckle: person >
    cry, weep, sob: person >
    talk, chat, speak: person >
exercise, work out
    dance, waltz: person >
    swim, bathe: person, animal >
    skate: person >
    fight, brawl: person >
"""

# A line is a dimension; its concepts, parted by "/", exclude each other: a contradiction replaces one by another.
MANNERS = """
quickly, rapidly, swiftly / slowly, unhurriedly, leisurely
quietly, silently, noiselessly / loudly, noisily
carefully, cautiously / carelessly, clumsily
happily, cheerfully, joyfully / sadly, gloomily / angrily, furiously
"""

ANIMATE_ATTRIBUTES = """
old, elderly, aged / young, youthful
tall, lanky / short, stocky
fat, plump, chubby / thin, slender, skinny
tired, weary, exhausted / lively, energetic
brave, fearless / timid, shy, anxious
hungry, starving / well-fed, satisfied
strong, muscular, powerful / weak, frail, feeble
friendly, kind, gentle / nasty, hostile
"""

OBJECT_ATTRIBUTES = """
red, scarlet / blue, navy / green, emerald / black, jet-black / white, snow-white / yellow, golden
big, large, huge / small, little, tiny
ancient, antique / new, brand-new, modern
cheap, inexpensive / expensive, costly, pricey
beautiful, pretty, lovely / ugly, hideous
dirty, filthy, grimy / spotless, immaculate
"""

FOOD_ATTRIBUTES = """
hot, steaming / cold, chilled
tasty, delicious, yummy / awful, disgusting
fresh, home-made / stale, spoiled
"""

COUNTS = """
two, a pair of, a couple of / several, a group of, a few
"""

# Whose age is in the word already: no "elderly toddler".
AGE_IMPLIED = ("boy", "girl", "toddler", "child", "grandmother", "grandfather")

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

# ... and "{}" is a noun phrase with a participle: "a boy eating an apple". It is indefinite.
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


def plural(noun: str) -> str:
    """The plural of a noun; of several words, the last is inflected."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith("man"):
        return noun[:-3] + "men"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def inflect(verb: str) -> tuple[str, str, str]:
    """The forms of a verb as in (repairs, repairing, repaired); of several words, the first is inflected."""
    base, space, rest = verb.partition(" ")
    stem = base
    if re.fullmatch("[^aeiou]*[aeiou][bdgklmnprtz]", base):  # chop -> chopping, but cook -> cooking
        stem = base + base[-1]
    if base.endswith("y") and base[-2] not in "aeiou":
        present, past = base[:-1] + "ies", base[:-1] + "ied"
    else:
        present = base + ("es" if base.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")
        past = base + "d" if base.endswith("e") else stem + "ed"
    if base.endswith("ie"):
        participle = base[:-2] + "ying"
    elif base.endswith("e") and not base.endswith("ee"):
        participle = base[:-1] + "ing"
    else:
        participle = stem + "ing"
    past = IRREGULAR_PARTICIPLES.get(base, past)
    return present + space + rest, participle + space + rest, past + space + rest
