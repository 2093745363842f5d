"""The rules and the words of the embedded corpus, as data; `grammar.py` samples from them.

An alternative of a rule is a template with four kinds of brackets:

    {thing}      a variable: bound to a word at its first reference in the story, the same word ever after;
    {hero.his}   another form of its word ({hero.His} is the form with a capital letter);
    <spot>       a rule, applied anew each time; in <spot {place.kind}> a form of a variable selects the rule;
    [one|other]  alternatives in place.

An alternative that starts with `3*` is three times as likely as one without a number.

Three conventions make the stories a fair test of memory that a small model can learn to pass. New things come with "a",
known ones with "the", and friends have names where the hero may be "the girl": so a reader knows when to remember, and
whom. What a story introduces comes back soon and often. No word of a list begins a story or a quotation, because there
a tokenizer would see it without its space, as a different token.
"""

from __future__ import annotations

Word = dict[str, str]


def _list(text: str) -> list[str]:
    """Split a comma-separated list, which may have several lines."""
    return [" ".join(item.split()) for item in text.split(",")]


def _words(text: str, **forms: str) -> list[Word]:
    """Make words with their indefinite article (form `a`) and the forms that all of them share."""
    return [{"": word, "a": f"{'an' if word[0] in 'aeiou' else 'a'} {word}", **forms} for word in _list(text)]


GIRLS = _words(
    """Ada, Amy, Anna, Bella, Clara, Daisy, Ella, Emma, Eva, Flora, Grace, Iris, Ivy, Jane, Kate, Lena, Lily, Lola,
    Lucy, Maya, Mia, Molly, Nell, Nina, Nora, Olive, Polly, Rosa, Ruby, Sally, Tess, Zoe""",
    **{"he": "she", "him": "her", "his": "her", "child": "girl", "opposite": "boy"},
)
BOYS = _words(
    """Adam, Alex, Ben, Billy, Dan, David, Eli, Emil, Felix, Finn, Frank, Fred, George, Gus, Henry, Hugo, Jack, Jim,
    Joe, Leo, Luke, Max, Milo, Ned, Noah, Oscar, Otto, Paul, Peter, Sam, Tim, Toby""",
    **{"he": "he", "him": "him", "his": "his", "child": "boy", "opposite": "girl"},
)

# The word lists: a variable is bound to a word of the list of its own name, or of the list that DRAWN_FROM names. A
# word with a `weight` is that much likelier than the others of its list. A word is in one list only, so that a reader
# can infer its role in the story from the word.
WORDS: dict[str, list[Word]] = {
    "girl": GIRLS,
    "boy": BOYS,
    "anyone": GIRLS + BOYS,
    "who": [
        *_words("girl", names="girl", weight="8"),
        *_words("boy", names="boy", weight="8"),
        *_words(
            """bear, fox, rabbit, mouse, hedgehog, badger, otter, squirrel, beaver, mole, kitten, puppy, lamb, pig,
            panda, penguin, lion, tiger, monkey, dragon""",
            names="anyone",
        ),
    ],
    "trait": _words(
        """brave, kind, curious, clever, calm, cheerful, gentle, lively, quiet, merry, patient, polite, funny, dreamy,
        busy, bold, careful, friendly, playful, hopeful, helpful, smart, jolly, proud, tidy, wise, generous, loyal"""
    ),
    "look": _words(
        """red, blue, green, yellow, orange, purple, pink, white, black, silver, brown, striped, spotted, shiny, big,
        small, pretty, lovely, magic, special, bright, dusty, painted, plain"""
    ),
    "thing": [
        *_words(
            "ball, kite, doll, puppet, balloon, marble, teddy, sled, train, truck, rocket, wagon, puzzle", kind="toy"
        ),
        *_words("hat, scarf, cap, mitten, ribbon, coat, belt, glove, sock, boot, sweater, crown", kind="clothes"),
        *_words(
            "shell, stone, feather, coin, key, map, book, bell, mirror, pearl, medal, pencil, jewel, clock, cup, flag",
            kind="treasure",
        ),
        *_words("flute, harp, fiddle, violin, guitar, trumpet, horn", kind="instrument"),
    ],
    "place": [
        *_words("forest, meadow, valley, jungle, field, desert, swamp, canyon", kind="wild", at="in"),
        *_words("river, lake, pond, stream, waterfall, harbor, canal, fountain", kind="water", at="by"),
        *_words("market, school, station, library, museum, fair, zoo, circus, theater, castle", kind="town", at="at"),
        *_words("garden, orchard, barn, stable, yard, greenhouse, vineyard, pasture", kind="farm", at="in"),
    ],
    "age": _words(
        """old, gray, fat, tall, large, skinny, sleepy, grumpy, quick, slow, shy, silly, fluffy, noisy, nosy, sly,
        plump, strong"""
    ),
    "helper": _words(
        """owl, turtle, hare, wolf, frog, toad, hen, goose, duck, crow, robin, rat, cat, dog, cow, horse, donkey,
        sheep, deer, moose, snail, spider, parrot, swan"""
    ),
    "plight": _words(
        "wet, cold, thin, frightened, muddy, weak, shivering, scruffy, tired, young, poor, dizzy, sick, tiny"
    ),
    "creature": _words(
        """chick, bird, bunny, fawn, cub, calf, piglet, hamster, foal, bat, moth, chipmunk, dove, wren, tadpole,
        beetle, newt, seagull"""
    ),
    "tool": _words("rope, net, ladder, stick, spoon, shovel, hook, rake, broom, bucket, hammer, pole"),
    "taste": _words("sweet, warm, fresh, tasty, sticky, creamy, spicy, juicy, huge, crispy, fruity, delicious, salty"),
    "food": _words(
        "cake, pie, cookie, loaf, muffin, pancake, pudding, tart, waffle, pizza, sandwich, salad, stew, soup"
    ),
    "fear": _words(
        """spiders, shadows, ghosts, monsters, snakes, bees, strangers, wolves, sharks, witches, storms, clowns, rats,
        trolls"""
    ),
    "building": _words(
        "tower, raft, hut, bridge, tent, fort, cabin, treehouse, snowman, swing, windmill, fence, slide, stage"
    ),
    "hobby": _words(
        """chase butterflies, pick flowers, fly kites, watch clouds, count stars, feed ducks, collect shells, tell
        stories, dig holes, paint pictures, read books, solve riddles, plant seeds, race snails, gather berries,
        invent games, catch frogs, throw snowballs, blow bubbles, share secrets"""
    ),
    "skill": [
        *_words("swim, skate, ski, surf, juggle, climb, row, dive, tumble, dance, wrestle, leap", kind="body"),
        *_words("sing, whistle, hum, drum, chirp, yodel", kind="music"),
        *_words("draw, knit, sew, weave, carve, cook, write, bake, spell, tie knots", kind="craft"),
    ],
    "noise": _words("thump, squeak, scratch, growl, rumble, rustle, bang, sneeze, howl, hiss, creak, buzz"),
    "room": _words("cellar, kitchen, cupboard, hallway, closet, pantry, chimney, garage, shed, basement"),
}
DRAWN_FROM = {"hero": "{who.names}", "friend": "{hero.opposite}"}

# The story grammar: each rule is a list of alternatives.
RULES: dict[str, list[str]] = {
    "story": ["<opening> <plot><moral>"],
    "plot": [
        "<lost thing>",
        "<new skill>",
        "<rescue>",
        "<shared meal>",
        "<old fear>",
        "<building>",
        "<saving up>",
        "<new friend>",
        "<strange noise>",
    ],
    "opening": [
        "3*Once upon a time, there was {trait.a} little {who} named {hero}.",
        "2*There once was {trait.a} {who} named {hero}.",
        "In a <cozy> <house> <by the sea> lived {trait.a} {who} named {hero}.",
        "Long ago, <by the sea>, there lived {trait.a} {who} named {hero}.",
        "Have you heard of the {trait} {who} named {hero}?",
    ],
    "cozy": _list("cozy, crooked, snug, narrow, mossy, leafy, simple, drafty, brick, wooden"),
    "house": _list("cottage, house, burrow, den, village, town, lighthouse, farmhouse, mansion, cave"),
    "by the sea": [
        "[by|near|far from|beside|close to|beyond] the"
        " [ocean|railway|volcano|glacier|cliffs|rainbow|mill|crossroads|marsh|coast]"
    ],
    "moral": [
        "4*",
        " What {trait.a} {who}!",
        " Everyone [loved|praised|admired] the little {who}.",
        " And {hero} was [happy|glad] ever after.",
    ],
    # --- what many stories share
    "when": ["2*One <weather> <day>", "2*On a <weather> <day>", "The next <day>", "Early one <day>", "Late one <day>"],
    "weather": _list(
        "sunny, windy, rainy, foggy, snowy, cloudy, frosty, hot, misty, stormy, chilly, breezy, mild, golden"
    ),
    "day": _list("2*morning, 2*afternoon, 2*evening, Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
    "elder": _list("mother, father, grandmother, grandfather, aunt, uncle, sister, brother, cousin, teacher"),
    "moved": _list(
        """walked, ran, skipped, hopped, marched, strolled, wandered, hurried, raced, tiptoed, danced, rushed, dashed,
        trotted, jogged, crept, hiked, galloped, bounced, sneaked, rode, scampered"""
    ),
    "said": _list("said, whispered, murmured, mumbled, laughed, chuckled, declared, announced"),
    "cried": _list("cried, shouted, gasped, wailed, called, yelled, exclaimed, groaned, muttered, screamed"),
    "wept": _list("wept, sighed, sobbed, sniffled, frowned, trembled, sulked, moaned, shivered, cried"),
    "arrived": _list("came by, stopped, appeared, looked up, woke up, waved, turned around, peeked out"),
    "thanked": _list("thanked, hugged, kissed, cuddled, patted, praised"),
    "cheered": _list("cheered, clapped, danced, sang, waved, smiled, whistled, celebrated"),
    "had fun": _list("danced, sang, played all day, shared a nap, laughed together, told jokes, hugged, ate plums"),
    # --- a lost thing is found
    "lost thing": ["<treasure> <outing> <loss> <search> <found>"],
    "treasure": [
        "{hero} had {look.a} {thing} and <adored it>.",
        "{hero} never went anywhere without {hero.his} {look} {thing}.",
        "{hero}'s <elder> had given {hero.him} {look.a} {thing}.",
        "For {hero.his} birthday, {hero} got {look.a} {thing}.",
    ],
    "adored it": _list("took it everywhere, loved it dearly, kept it clean, hugged it often, told it secrets"),
    "outing": [
        "<when>, {hero} <moved> to {place.a} with the {look} {thing}.",
        "<when>, {hero} took the {look} {thing} to {place.a}.",
    ],
    "loss": [
        "But near the {place}, the {thing} was [gone|missing|lost]. <sorrow>",
        "But the {thing} <vanished {thing.kind}>. <sorrow>",
    ],
    "vanished toy": _list("rolled away, bounced away, tumbled away, slid out of sight"),
    "vanished clothes": _list("blew away, slipped off, fluttered away, flew away"),
    "vanished treasure": _list("fell out of the bag, dropped out of sight, slipped away, sank into the mud"),
    "vanished instrument": _list("was left behind, went missing, was forgotten, fell down"),
    "sorrow": [
        "The {who} <wept>.",
        '"Oh no!" <cried> the {who}.',
        "The {who} felt [sad|lonely|worried|upset|unhappy] and <wept>.",
    ],
    "search": [
        '"Have you seen my {look} {thing}?" {hero} asked {age.a} {helper}. <hunt>',
        "{age.A} {helper} <arrived> and offered to help. <hunt>",
        '"I will help you," <said> {age.a} {helper}. <hunt>',
    ],
    "hunt": [
        "They <searched> all over the {place} and found it <spot {place.kind}>.",
        "The {helper} <searched> <spot {place.kind}>, and there it was!",
    ],
    "searched": _list("looked, searched, hunted, peeked, sniffed, dug, poked, rummaged, peered"),
    "spot wild": _list(
        "under a log, behind a tree, in a hollow stump, beneath a bush, between two roots, in the grass"
    ),
    "spot water": _list(
        "under a canoe, among the reeds, under a lily pad, between two pebbles, on the sand, in the mud"
    ),
    "spot town": _list("under a bench, behind a barrel, in a gutter, under a table, behind a door, behind a statue"),
    "spot farm": _list("in the hay, behind a bush, under a cart, beside a gate, under a cabbage, in the straw"),
    "found": [
        "{hero} <thanked> the {helper} and <moved> home with the {look} {thing}.",
        "{hero} <thanked> the {helper} and never lost the {look} {thing} again.",
        "That night, {hero} <slept> with the {look} {thing} <close by>.",
    ],
    "slept": _list("slept, dreamed, snored, dozed, rested, cuddled up"),
    "close by": _list("on the pillow, under the pillow, by the window, next to the bed, under the blanket"),
    # --- a skill is learned
    "new skill": ["<dream> <practice> <lesson> <success>"],
    "dream": [
        "{hero} wanted to learn how to {skill}.",
        "{hero} dreamed of one thing: to {skill}.",
        "{hero}'s [great|secret|biggest|dearest] wish was to {skill}.",
    ],
    "practice": [
        "Every <day>, {hero} tried to {skill} {place.at} {place.a}, but <failed {skill.kind}>.",
        "<when>, {hero} <moved> to {place.a} and tried to {skill}, but <failed {skill.kind}>.",
    ],
    "failed body": ["{hero.he} always fell [over|down]", "{hero.his} [legs|arms|knees|feet] would not obey"],
    "failed music": _list("the birds flew away, the dogs howled, it sounded awful, people covered their ears"),
    "failed craft": _list("it came out crooked, it looked silly, it fell apart, nobody liked it"),
    "lesson": [
        '"I will never {skill}!" <cried> the {who}. {age.A} {helper} heard it. <animal lesson>',
        "Then {age.a} {helper} <arrived>. <animal lesson>",
        "Then {hero.his} friend {friend} <arrived>. <friend lesson>",
    ],
    "animal lesson": [
        '"<advice>," <said> the {helper}, and they <practiced>.',
        'The {helper} showed {hero} a trick and <said>, "<advice>."',
    ],
    "friend lesson": [
        '"<advice>," <said> {friend}, and they <practiced>.',
        '{friend} showed {hero} a trick and <said>, "<advice>."',
    ],
    "advice": _list(
        """Do not hurry, Try once more, Take a deep breath, Take small steps, Just follow me, Close your eyes, Never
        give up, Stay calm"""
    ),
    "practiced": [
        "practiced [all day|all night|all summer|every day|for hours|in the rain]",
        "tried [again and again|very hard]",
    ],
    "success": [
        "At last, {hero} could {skill} <very well>, and the whole {place} <cheered>.",
        "[Soon|By spring|After that|In the end], {hero} could {skill} <very well> and <was proud>.",
    ],
    "very well": _list("very well, better than anyone, without any help, like a star, all day long"),
    "was proud": _list("was proud, smiled all week, jumped for joy, hugged everyone, felt ten feet tall"),
    # --- a creature is rescued
    "rescue": ["<equipped> <cry> <saved> <grateful>"],
    "equipped": [
        "{hero} always carried {look.a} {tool} in {hero.his} [bag|basket|cart|backpack].",
        "{hero}'s <elder> had lent {hero.him} {look.a} {tool}.",
        "{hero} never left home without {look.a} {tool}.",
    ],
    "cry": [
        "<when>, {hero} took the {look} {tool} to {place.a} and heard a [soft|faint|strange] cry. <victim>",
        "<when>, {hero} <moved> to {place.a} and heard a [voice|sob|whimper]. <victim>",
    ],
    "victim": [
        "It was {plight.a} {creature}, <trapped> <spot {place.kind}>.",
        '{plight.A} {creature} was <trapped> <spot {place.kind}>. "<plea>!" <begged> the {creature}.',
    ],
    "trapped": _list("stuck, trapped, caught, tangled, pinned, lying, shaking, hiding"),
    "plea": _list("Help me, Please help, I cannot move, My leg hurts, I am so scared, I want my mother"),
    "begged": _list("begged, squeaked, whimpered, cried, peeped, sobbed, yelped"),
    "saved": [
        "With the {look} {tool}, {hero} <freed> the {creature}.",
        "{hero} used the {look} {tool} to <free> the {creature}.",
    ],
    "freed": _list("freed, lifted, pulled out, rescued, untangled, saved, dragged out, helped"),
    "free": _list("free, lift, reach, rescue, untangle, save, pull out, help"),
    "grateful": [
        "The {creature} <nuzzled> the {who}, and they <had fun> near the {place}.",
        "From then on, {hero} and the {creature} <moved> to the {place} every <day>.",
    ],
    "nuzzled": _list("kissed, thanked, tickled, licked, hugged, followed, trusted"),
    # --- a meal is shared
    "shared meal": ["<baking> <meeting> <gift> <reward>"],
    "baking": [
        "{hero} <baked> {taste.a} {food} for {hero.his} friend {friend} and <moved> to {place.a}.",
        "<when>, {hero} <baked> {taste.a} {food} for {hero.his} friend {friend}, who lived {place.at} {place.a}.",
    ],
    "baked": _list("baked, made, cooked, prepared, bought, packed, wrapped, fetched"),
    "meeting": [
        "Near the {place}, the {who} met {age.a} {helper}."
        ' "I have not eaten [today|all day|for days]," <said> the {helper}.',
        '{age.A} {helper} <arrived>. "That {food} smells [good|so nice|like home]," <said> the {helper}.',
    ],
    "gift": [
        "{hero} gave [half of|most of|all of] the {food} to the {helper}.",
        "The {who} [thought|waited|smiled|stopped] for a moment and shared the {food} with the {helper}.",
    ],
    "reward": [
        "The {helper} <thanked> {hero} and gave {hero.him} <a basket of berries> for {friend}. <praise>",
        "{friend} was not [angry|cross|upset] at all. <praise>",
    ],
    "a basket of berries": [
        "[a basket of|a pile of|two sacks of|a hat full of] [berries|apples|nuts|corn|roses|pears|peas|figs]"
    ],
    "praise": ["{hero} and {friend} <had fun>.", "{friend} said that no {food} had ever tasted better."],
    # --- a fear is overcome
    "old fear": ["<afraid> <trial> <comfort> <courage>"],
    "afraid": [
        "But {hero} was [afraid|scared|terrified] of {fear}.",
        "Only one thing [frightened|scared|worried] {hero}: {fear}.",
    ],
    "trial": [
        '<when>, {hero} had to go to {place.a}. "The {fear} live near the {place}!" <cried> the {who}.',
        "When {hero.his} <elder> sent {hero} to {place.a}, the {who} thought of the {fear} and <shook>.",
    ],
    "shook": _list("shook, hid, trembled, froze, shivered, fainted, screamed"),
    "comfort": [
        '{hero.His} friend {friend} gave {hero.him} {look.a} {thing}. "<You can do it>," <said> {friend}.',
        '"Take my {look} {thing}," <said> {hero.his} friend {friend}. "<You can do it>."',
    ],
    "You can do it": _list(
        "It will keep you safe, It makes me brave, It will bring you luck, Hold it tight, You can do it"
    ),
    "courage": [
        "{hero} held the {look} {thing} and <moved> to the {place}, not afraid of the {fear} any more.",
        "With the {look} {thing}, {hero} forgot all about the {fear}. {hero} and {friend} <had fun>.",
        "It worked! {hero} laughed at the {fear} and gave the {look} {thing} back to {friend}.",
    ],
    # --- something is built twice
    "building": ["<plan> <work> <collapse> <new try>"],
    "plan": [
        "{hero} and {hero.his} friend {friend} decided to build {look.a} {building} {place.at} {place.a}.",
        '<when>, {hero.his} friend {friend} <said>, "Let us build {look.a} {building} {place.at} {place.a}."',
    ],
    "work": [
        "They used <straw> and <sticks>.",
        "{hero} brought <straw>, and {friend} brought <sticks>.",
    ],
    "straw": _list("straw, paper, leaves, feathers, sand, grass, cloth, blankets, pillows, moss"),
    "sticks": _list("sticks, branches, glue, string, ribbons, twigs, boxes, jam, snow, socks"),
    "collapse": [
        "But <the wind> <broke> the {look} {building}, and {friend} <wept>.",
        'But <the wind> came, and the {look} {building} fell down. "Oh no!" <cried> {friend}.',
    ],
    "the wind": _list("the wind, the rain, the snow, a storm, a wave, a flood, a goat, a big bull, a pirate, a giant"),
    "broke": _list("broke, smashed, crushed, ruined, squashed, wrecked, toppled, flattened"),
    "new try": [
        '"We will try again," <said> the {who}. This time they used <bricks>, and the {building} stood. <party>',
        "{hero} fetched <bricks>, and they built a better {building}. <party>",
    ],
    "bricks": _list("bricks, stones, wood, nails, iron, logs, planks, steel, clay, rocks"),
    "party": ["{hero} and {friend} <had fun> in the {building}.", "The whole {place} <cheered>."],
    # --- something is saved up for
    "saving up": ["<longing> <chores> <purchase>"],
    "longing": [
        "{hero} wanted {look.a} {thing} more than anything, but had only <few> coins.",
        "At {place.a}, {hero} saw {look.a} {thing}. It cost <many> coins, and {hero} had only <few>.",
    ],
    "few": _list("two, three, four, five, six, seven"),
    "many": _list("ten, twelve, twenty, thirty, forty, fifty"),
    "chores": [
        "To buy the {look} {thing}, {hero} <swept floors> for the <baker> and <dusted shelves> for {hero.his} <elder>.",
        "All <season>, {hero} <swept floors> for the <baker> and <dusted shelves> for {hero.his} <elder>.",
    ],
    "season": _list("spring, summer, fall, winter, week, month, year"),
    "swept floors": _list(
        """swept floors, washed dishes, watered roses, peeled carrots, picked cherries, carried water, chopped wood,
        polished boots, milked cows, raked leaves"""
    ),
    "dusted shelves": _list(
        """dusted shelves, ironed shirts, ground flour, delivered letters, walked dogs, brushed horses, mended nets,
        scrubbed pots, stacked boxes, cleaned windows"""
    ),
    "baker": _list(
        "baker, farmer, miller, tailor, doctor, king, queen, painter, sailor, gardener, pilot, captain, wizard"
    ),
    "purchase": [
        "At last, {hero} bought the {look} {thing} and <used {thing.kind}> all day.",
        "But the {look} {thing} was [sold|gone]! Then {hero.his} friend {friend} came with a box."
        " In it was the {look} {thing}. {hero} <thanked> {friend}.",
        "{hero} <moved> to the shop and came home with the {look} {thing}. Everyone <cheered>.",
    ],
    "used toy": _list("played with it, pushed it, cuddled it"),
    "used clothes": _list("wore it, tried it on, twirled in it"),
    "used treasure": _list("admired it, looked at it, showed it around"),
    "used instrument": _list("played it, made music, practiced"),
    # --- a friend is made
    "new friend": ["<alone> <stranger> <invitation> <together>"],
    "alone": [
        "{hero} liked to {hobby}, but had nobody to play with.",
        "{hero} was new in town, and it was no fun to {hobby} alone.",
    ],
    "stranger": [
        "<when>, {place.at} {place.a}, {hero} met a {friend.child} called {friend} with {look.a} {thing}.",
        "<when>, a {friend.child} called {friend} came to {place.a} with {look.a} {thing}.",
    ],
    "invitation": [
        '"Do you want to {hobby} with me?" asked the {who}. {friend} <nodded>.',
        '"Let us {hobby}, and you may hold my {thing}," <said> {friend}. The {who} <nodded>.',
    ],
    "nodded": _list("nodded, smiled, laughed, agreed, blushed, grinned"),
    "together": [
        "So {hero} and {friend} went to the {place} to {hobby}.",
        "Now {hero} and {friend} {hobby} every <day>, and {friend} shares the {look} {thing}.",
    ],
    # --- a noise is explained
    "strange noise": ["<night> <guess> <courage to look> <surprise>"],
    "night": [
        "One <weather> night, {hero} heard a {noise} in the {room}.",
        "Every night, there was a {noise} in the {room}, and {hero} could not sleep.",
    ],
    "guess": [
        '"Did a [ghost|monster|thief|giant|dragon|troll|pirate|witch] make the {noise}?" <cried> the {who}.',
        "The {noise} grew louder, and the {who} [hid|trembled|shivered] under the [bed|blanket|table|pillow].",
    ],
    "courage to look": [
        "{hero}'s <elder> took a [lamp|candle|lantern|torch], and they <moved> to the {room}.",
        "{hero} took {look.a} {tool} and <moved> to the {room}.",
    ],
    "surprise": [
        "It was only {plight.a} {creature} that wanted {taste.a} {food}. <pet>",
        'There sat {plight.a} {creature}. "The {noise} was me," <said> the {creature}. <pet>',
    ],
    "pet": [
        "{hero} made a bed for the {creature} in the {room}.",
        "Now the {creature} sleeps next to {hero}, and nobody fears the {noise} any more.",
    ],
}
