"""The words and sentences of the embedded corpus: what `stories.py` draws from, and nothing that draws.

Three brackets make a sentence a template:

    {thing}      a remembered word: drawn when the story first mentions it, and the same ever after;
    {hero.his}   another form of it (a capital, {hero.His}, writes that form with a capital);
    <spot>       a rule, chosen anew each time; <spot {place.kind}> lets a remembered word pick the rule;
    [one|other]  a choice on the spot.

An alternative that starts with `3*` is three times as likely as one without. No word from a list opens a story
or a quotation: a tokenizer would see it without its space there, as a second, different word.
"""

from __future__ import annotations

Word = dict[str, str]


def _list(text: str) -> list[str]:
    """The items of a comma-separated list that may run over several lines."""
    return [" ".join(item.split()) for item in text.split(",")]


def _words(text: str, **forms: str) -> list[Word]:
    """Words with their indefinite article (`a`) and the forms that all of them share."""
    return [{"": word, "a": f"{'an' if word[0] in 'aeiou' else 'a'} {word}", **forms} for word in _list(text)]


SHE = {"he": "she", "him": "her", "his": "her", "child": "girl", "opposite": "boy"}
HE = {"he": "he", "him": "him", "his": "his", "child": "boy", "opposite": "girl"}

GIRLS = _words(
    """Ada, Amy, Anna, Bella, Clara, Daisy, Ella, Emma, Eva, Fay, Flora, Gina, Grace, Hanna, Hazel, Holly, Iris,
    Ivy, Jane, Jenny, Julia, Kate, Kiki, Lena, Lily, Lola, Lucy, Lulu, Maya, Mia, Millie, Molly, Nell, Nina,
    Nora, Olive, Penny, Pia, Polly, Rosa, Ruby, Sally, Sara, Sofia, Stella, Tess, Tilly, Vera, Wendy, Zoe""",
    **SHE,
)
BOYS = _words(
    """Adam, Alex, Arlo, Ben, Billy, Bobby, Carl, Dan, David, Eddie, Eli, Emil, Felix, Finn, Frank, Fred,
    George, Gus, Hans, Harry, Henry, Hugo, Jack, Jake, Jim, Joe, Jonas, Leo, Liam, Louis, Luke, Max, Milo,
    Ned, Nico, Noah, Oscar, Otto, Owen, Paul, Peter, Ralph, Rob, Sam, Simon, Theo, Tim, Toby, Tom, Walter""",
    **HE,
)

# The lists that remembered words are drawn from. The list of a word is named after it unless DRAWN_FROM says
# otherwise; `weight` makes a word likelier than the others of its list.
WORDS: dict[str, list[Word]] = {
    "girl": GIRLS,
    "boy": BOYS,
    "anyone": GIRLS + BOYS,
    "who": [
        *_words("girl", names="girl", weight="12"),
        *_words("boy", names="boy", weight="12"),
        *_words(
            """bear, fox, rabbit, mouse, hedgehog, badger, otter, squirrel, beaver, mole, kitten, puppy, duckling, lamb,
            goat, pig, panda, koala, penguin, elephant, lion, tiger, monkey, dragon""",
            names="anyone",
        ),
    ],
    "trait": _words(
        """brave, kind, curious, clever, calm, cheerful, gentle, lively, quiet, merry, patient, polite, funny,
        dreamy, busy, bold, careful, friendly, playful, thoughtful, happy, eager, hopeful, helpful, smart,
        sweet, jolly, proud, tidy, wise, nimble, good, generous, faithful, humble, bright, daring, caring,
        loyal, sunny"""
    ),
    "elder": _words(
        """mother, father, grandmother, grandfather, aunt, uncle, sister, brother, cousin, teacher, neighbor,
        godmother"""
    ),
    "look": _words(
        """red, blue, green, yellow, orange, purple, pink, white, black, golden, silver, brown, gray, striped,
        spotted, shiny, tiny, big, small, old, new, pretty, lovely, beautiful, fine, magic, special,
        wonderful, funny, bright, neat, dusty, colorful, sparkling, painted, rare"""
    ),
    "thing": [
        *_words(
            """ball, kite, doll, top, puppet, balloon, marble, robot, teddy, sled, boat, train, truck, hoop, rattle,
            rocket, wagon, puzzle, scooter, castle, dinosaur, plane, bike, bear""",
            kind="toy",
        ),
        *_words(
            """hat, scarf, cap, mitten, ribbon, coat, belt, glove, sock, boot, cape, sweater, necklace, bracelet, apron,
            crown, bow, jacket, shirt, ring, slipper, wig, mask, vest""",
            kind="clothes",
        ),
        *_words(
            """shell, stone, feather, coin, key, map, book, bell, lantern, mirror, pearl, medal, box, compass, pencil,
            picture, postcard, jewel, locket, acorn, clock, umbrella, basket, cup, jar, flag, brush, egg,
            button, statue, vase, crystal""",
            kind="treasure",
        ),
        *_words(
            "flute, drum, horn, harp, fiddle, violin, guitar, trumpet, banjo, whistle, accordion, tuba",
            kind="instrument",
        ),
    ],
    "place": [
        *_words(
            """forest, meadow, valley, woods, jungle, field, desert, swamp, canyon, clearing, grove, hills, mountains,
            dunes, bushes""",
            kind="wild",
            at="in",
        ),
        *_words(
            """river, lake, pond, stream, sea, creek, waterfall, harbor, bay, canal, brook, spring, fountain, pier,
            lighthouse""",
            kind="water",
            at="by",
        ),
        *_words(
            """market, school, station, library, bakery, museum, fair, zoo, circus, playground, theater, park, castle,
            palace, bookshop, festival, parade, inn""",
            kind="town",
            at="at",
        ),
        *_words(
            """garden, orchard, barn, stable, yard, greenhouse, vineyard, pasture, cellar, attic, hayloft, courtyard""",
            kind="farm",
            at="in",
        ),
    ],
    "age": _words(
        """old, young, tall, wise, kind, friendly, gray, fat, tiny, large, funny, gentle, sleepy, grumpy, clever,
        quick, shy, jolly, silly, hungry, proud, fluffy, lonely, merry, busy, brown"""
    ),
    "helper": _words(
        """owl, turtle, hare, wolf, frog, toad, hen, rooster, goose, duck, crow, raven, sparrow, robin, rat, cat,
        dog, cow, horse, donkey, pony, sheep, deer, moose, lizard, snail, worm, bee, spider, cricket,
        parrot, pelican, stork, swan, crab, seal, camel, peacock, ant, weasel, pigeon, ox, llama, zebra,
        giraffe, hippo, flamingo, butterfly"""
    ),
    "creature": _words(
        """chick, bird, ladybug, bunny, fawn, cub, calf, piglet, hamster, owlet, gosling, foal, bat, moth, chipmunk,
        canary, dove, wren, tadpole, gecko, beetle, caterpillar, newt, dragonfly, pup, lark, cygnet,
        seagull"""
    ),
    "plight": _words(
        "little, wet, lost, cold, thin, frightened, muddy, lonely, hungry, weak, shivering, sad, scruffy, tired"
    ),
    "tool": _words(
        """rope, net, ladder, stick, spoon, shovel, hook, rake, broom, bucket, ruler, hammer, pole, string, fork,
        ladle, plank, pan, saw, towel"""
    ),
    "taste": _words(
        """sweet, warm, fresh, crunchy, tasty, sticky, creamy, spicy, juicy, huge, crispy, buttery, fruity, golden,
        delicious, round"""
    ),
    "food": _words(
        """cake, pie, cookie, loaf, muffin, pancake, pudding, tart, bun, waffle, pizza, sandwich, pastry, omelet,
        biscuit, dumpling, salad, stew, roll, pretzel, cupcake, doughnut, noodle, soup"""
    ),
    "fear": _words(
        """the dark, thunder, lightning, deep water, big dogs, spiders, high places, loud noises, shadows, ghosts,
        monsters, snakes, bees, strangers, wolves, the moon, the wind, the fog, doctors, crowds, tunnels,
        witches, giants, bulls"""
    ),
    "building": _words(
        """tower, castle, raft, hut, bridge, tent, fort, cabin, treehouse, boat, wagon, snowman, swing, sandcastle,
        windmill, cart, fence, dam, slide, stage, birdhouse, oven, shed, tunnel"""
    ),
    "hobby": _words(
        """chase butterflies, pick flowers, fly kites, watch clouds, count stars, feed ducks, collect shells, climb
        trees, tell stories, sing songs, hunt for bugs, dig holes, splash in puddles, roll down hills, throw
        snowballs, play tag, bake cookies, paint pictures, read books, solve riddles, plant seeds, race
        snails, gather berries, invent games, catch frogs, make masks, draw maps, whistle tunes, follow
        ants, jump over logs, slide on the ice, blow bubbles, sail boats, toss pebbles, share secrets, ride
        ponies, juggle apples, wear funny hats, fold paper birds, dance in the rain"""
    ),
    "skill": [
        *_words(
            """swim, skate, ski, surf, juggle, turn cartwheels, ride a bike, walk on stilts, climb ropes, jump rope,
            skip stones, catch a ball, row a boat, dive, tumble, spin a hoop, do a handstand, kick a ball,
            gallop, fly""",
            kind="body",
        ),
        *_words(
            """sing, whistle, yodel, hum, play the flute, play the harp, play the fiddle, play the piano, ring the
            bells, beat the drum, blow the horn, strum the banjo""",
            kind="music",
        ),
        *_words(
            """paint, draw, knit, sew, weave, carve, bake bread, cook, write, fold paper hats, tie knots, make soup,
            braid hair, mend shoes, stitch quilts, mix colors""",
            kind="craft",
        ),
    ],
    "noise": _words(
        """thump, squeak, scratch, growl, rattle, rustle, whisper, tapping, crunch, sneeze, howl, hiss, creak, buzz,
        click, snore"""
    ),
    "room": _words("attic, cellar, kitchen, cupboard, barn, hallway, closet, pantry, bathroom, chimney, garage, shed"),
}

# Where a remembered word is drawn from when that is not the list of its own name.
DRAWN_FROM = {"hero": "{who.names}", "friend": "{hero.opposite}"}

# The story grammar. A rule is a list of alternatives.
RULES: dict[str, list[str]] = {
    "story": [
        "<opening> <lost thing>",
        "<opening> <new skill>",
        "<opening> <rescue>",
        "<opening> <shared meal>",
        "<opening> <fear>",
        "<opening> <building>",
        "<opening> <saving up>",
        "<opening> <new friend>",
        "<opening> <strange noise>",
    ],
    "opening": [
        "3*Once upon a time, there was {trait.a} little {who} named {hero}.",
        "2*There once was {trait.a} {who} named {hero}.",
        "In a <cozy> <cottage> <somewhere> lived {trait.a} {who} named {hero}.",
        "Long ago, <somewhere>, there lived {trait.a} young {who} called {hero}.",
        "The {who} in this story is called {hero}, and a more {trait} {who} was hard to find.",
    ],
    "cozy": _list("cozy, crooked, tiny, snug, warm, yellow, round, mossy, narrow, quiet, sunny, wooden"),
    "cottage": _list("cottage, house, cabin, hut, burrow, den, tower, village, town, windmill"),
    "somewhere": [
        "[by|near|far from|across] the [sea|river|forest|mountains|railway|old bridge|great lake|meadows|snow]",
        "[at the edge of|not far from|high above] the [world|woods|desert|village|harbor|cliffs]",
    ],
    # --- a lost thing is found
    "lost thing": ["<treasure> <outing> <loss> <search> <found>"],
    "treasure": [
        "{hero.He} had {look.a} {thing} and <adored it>.",
        "{hero.His} [dearest|favorite] [thing|possession|treasure] was {look.a} {thing}.",
        "{hero.His} {elder} had given {hero.him} {look.a} {thing}.",
        "For {hero.his} birthday, {hero.he} got {look.a} {thing} from {hero.his} {elder}.",
    ],
    "adored it": _list(
        """took it everywhere, never slept without it, loved it dearly, showed it to everyone, kept it very clean,
        hugged it every night, told it many secrets, would not trade it for gold"""
    ),
    "outing": [
        "One <weather> <day>, {hero.he} <moved> to the {place} with the {thing}.",
        "On a <weather> <day>, {hero} took the {thing} to the {place}.",
        "When the <weather> <day> came, {hero.he} carried the {thing} to the {place}.",
    ],
    "weather": _list(
        """sunny, windy, rainy, cold, warm, bright, foggy, snowy, cloudy, quiet, gray, frosty, fine, hot, misty,
        golden"""
    ),
    "day": _list(
        """morning, afternoon, evening, day, Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"""
    ),
    "moved": _list(
        """walked, ran, skipped, hopped, marched, strolled, wandered, hurried, raced, tiptoed, danced, rushed,
        dashed, trotted, jogged, crept, hiked, galloped, bounced, stomped, sneaked, paraded, rode,
        scampered"""
    ),
    "loss": [
        "But [on the way home|at noon|after lunch|a moment later], the {thing} was [gone|missing|nowhere]. <sorrow>",
        "But the {thing} <vanished {thing.kind}> and was [gone|lost]. <sorrow>",
    ],
    "vanished toy": _list("rolled away, bounced down a hill, tumbled into a hole, slid out of sight"),
    "vanished clothes": _list("blew away, slipped off, caught on a branch, fluttered off"),
    "vanished treasure": _list("dropped out of a pocket, sank into the mud, slipped through a crack, fell down"),
    "vanished instrument": _list("was left on a bench, went silent, was put down, lay forgotten"),
    "sorrow": [
        "{hero} <wept>.",
        '"Oh no!" <cried> {hero}.',
        "{hero.He} felt so <sad> that {hero.he} <wept>.",
    ],
    "wept": _list(
        "wept, sighed, sobbed, sniffled, frowned, trembled, sulked, moaned, groaned, shivered, wailed, cried"
    ),
    "cried": _list("cried, shouted, gasped, wailed, called, yelled, exclaimed, groaned, muttered, whispered"),
    "sad": _list("sad, lonely, worried, upset, gloomy, unhappy, miserable, helpless"),
    "search": [
        '"Have you seen my {thing}?" {hero.he} asked {age.a} {helper}. <hunt>',
        'Just then, {age.a} {helper} <arrived>. "I will help you," <said> the {helper}. <hunt>',
        '{age.A} {helper} <arrived>. "Did you lose {look.a} {thing}?" <said> the {helper}. <hunt>',
    ],
    "arrived": _list("came by, stopped, appeared, looked up, woke up, waved, turned around, peeked out"),
    "said": _list("said, asked, whispered, murmured, replied, answered, laughed, chuckled, smiled"),
    "hunt": [
        "They <searched> [everywhere|for hours|high and low] and found the {thing} <spot {place.kind}>.",
        "The {helper} <searched> <spot {place.kind}>, and there was the {thing}!",
    ],
    "searched": _list("looked, searched, hunted, peeked, sniffed, dug, poked, explored, rummaged, peered"),
    "spot wild": _list(
        """under a log, behind a tree, in a hollow stump, under a fern, beneath a bush, behind a rock, between two
        roots, under some leaves, in an empty nest, beside a mushroom"""
    ),
    "spot water": _list(
        """under a boat, behind a rock, among the reeds, under a lily pad, between two stones, on the sand, in a
        fishing net, beside a bucket, under a bridge, in the shallow water"""
    ),
    "spot town": _list(
        """under a bench, behind a barrel, in a cart, beside a lamp, under a table, behind a door, in a flowerpot,
        on a windowsill, behind a statue, under the stairs"""
    ),
    "spot farm": _list(
        """in the hay, behind a bucket, under a wheelbarrow, beside a fence, behind a ladder, under a cabbage, among
        the pumpkins, in an empty barrel, beside a rake, under a pile of straw"""
    ),
    "found": [
        "{hero} <thanked> the {helper} and <moved> home with the {thing}.",
        '"Thank you, dear {helper}!" said {hero}, and {hero.he} never lost the {look} {thing} again.',
        "That night, {hero.he} <slept> with the {look} {thing} <close by>.",
    ],
    "thanked": _list("thanked, hugged, kissed, cuddled, patted, praised"),
    "slept": _list("slept, dreamed, snored, dozed, rested, fell asleep"),
    "close by": _list("on the pillow, under the pillow, close by, by the window, next to the bed, under the blanket"),
    # --- a skill is learned
    "new skill": ["<dream> <practice> <lesson> <success>"],
    "dream": [
        "{hero.He} wanted to learn how to {skill}.",
        "More than anything, {hero.he} wished to {skill}.",
        "{hero.His} [great|secret|biggest] dream was to {skill}.",
    ],
    "practice": [
        "Every <day>, {hero.he} <moved> to the {place} to try, but <failed {skill.kind}>.",
        "{hero.He} practiced {place.at} the {place}, but <failed {skill.kind}>.",
    ],
    "failed body": [
        "{hero.he} always fell [over|down|on {hero.his} nose|into the mud]",
        "{hero.his} [legs|arms|knees|feet] would not obey",
    ],
    "failed music": _list(
        "the birds flew away, the dogs howled, it sounded awful, people covered their ears, the babies cried"
    ),
    "failed craft": _list("it came out crooked, it looked silly, everything got messy, it fell apart, nobody liked it"),
    "lesson": [
        '"I will never {skill}!" {hero.he} <cried>. {age.A} {helper} heard {hero.him}. <animal lesson>',
        "One <weather> <day>, {age.a} {helper} <arrived>. <animal lesson>",
        "Then {hero.his} friend {friend} <arrived>. <friend lesson>",
    ],
    "animal lesson": [
        '"<advice>," <said> the {helper}. So the {helper} and {hero} <practiced>.',
        'The {helper} [showed|taught] {hero.him} a trick. "<advice>," <said> the {helper}.',
    ],
    "friend lesson": [
        '"<advice>," <said> {friend}. So {friend} and {hero} <practiced>.',
        '{friend} [showed|taught] {hero.him} a trick. "<advice>," <said> {friend}.',
    ],
    "advice": _list(
        """Do not hurry, Try once more, Take a deep breath, Start with a small step, Just follow me, Close your eyes
        and smile, Never give up, Think of something nice"""
    ),
    "practiced": [
        "practiced [all day|until dark|for a week|every day|for hours|in the rain|until the stars came out]",
        "tried [again and again|a hundred times|very hard]",
    ],
    "success": [
        "At last, {hero} could {skill} <very well>, and everyone {place.at} the {place} <cheered>.",
        "[Soon|By spring|After that|The next day], {hero.he} could {skill} <very well>. {hero} <celebrated>.",
    ],
    "very well": _list("very well, better than anyone, without any help, like a star, all day long, with closed eyes"),
    "cheered": _list("cheered, clapped, whistled, danced, bowed, waved, jumped for joy, laughed"),
    "celebrated": _list(
        """was proud, smiled all week, danced for joy, hugged everyone, could not stop grinning, shouted with joy,
        felt ten feet tall, glowed with joy"""
    ),
    # --- a creature is rescued
    "rescue": ["<equipped> <cry> <saved> <friends>"],
    "equipped": [
        "{hero.He} always carried {look.a} {tool} in {hero.his} [bag|basket|cart|backpack].",
        "{hero.His} {elder} had lent {hero.him} {look.a} {tool}.",
        "{hero.He} never left home without {look.a} {tool}.",
    ],
    "cry": [
        "One <weather> <day>, {hero.he} <moved> to the {place} and heard a [soft|faint|tiny|strange] cry. <victim>",
        "On a <weather> <day>, {place.at} the {place}, {hero.he} heard a [voice|sob|whimper]. <victim>",
    ],
    "victim": [
        "It was {plight.a} {creature}, <trapped> <spot {place.kind}>.",
        '{plight.A} {creature} was <trapped> <spot {place.kind}>. "<plea>!" <begged> the {creature}.',
    ],
    "trapped": _list("stuck, trapped, caught, lost, tangled, pinned, lying"),
    "plea": _list("Help me, Please, I cannot move, My leg hurts, I am so scared, I want my mother"),
    "begged": _list("begged, squeaked, whimpered, cried, pleaded, peeped, sobbed, yelped"),
    "saved": [
        "With the {tool}, {hero} <freed> the {creature}.",
        "{hero} remembered the {look} {tool} and used it to <free> the {creature}.",
    ],
    "freed": _list("freed, lifted, pulled out, rescued, untangled, saved, dragged out"),
    "free": _list("free, lift, reach, rescue, untangle, save, pull out"),
    "friends": [
        "The {creature} <nuzzled> {hero.him}, and the two met {place.at} the {place} every <day>.",
        '"You are a very {trait} {who}," said the {creature}, and they <celebrated together>.',
        "From then on, {hero} and the {creature} were [best friends|never apart|like family].",
    ],
    "nuzzled": _list("nuzzled, kissed, thanked, tickled, licked, hugged, followed"),
    "celebrated together": _list(
        "danced, sang, played all day, shared a nap, laughed together, walked home, hugged, ate berries"
    ),
    # --- a meal is shared
    "shared meal": ["<baking> <meeting> <gift> <reward>"],
    "baking": [
        "{hero.He} <baked> {taste.a} {food} for {hero.his} {elder} and <moved> to the {place} with it.",
        "One <weather> <day>, {hero.he} <baked> {taste.a} {food} for {hero.his} {elder}, who lived {place.at} the"
        " {place}.",
    ],
    "baked": _list("baked, made, cooked, prepared, bought, packed, wrapped"),
    "meeting": [
        'On the way, {hero.he} met {age.a} {helper}. "I have not eaten [today|all day|for days]," <said> the {helper}.',
        '{age.A} {helper} <arrived>. "That {food} smells [good|so nice|like home]," <said> the {helper}.',
    ],
    "gift": [
        "{hero} gave [half of|most of|all of] the {food} to the {helper}.",
        "{hero} [thought|waited|smiled] for a moment and shared the {food} with the {helper}.",
    ],
    "reward": [
        "The {helper} <thanked> {hero.him} and brought <gifts> for {hero.his} {elder}. <praise>",
        "{hero.His} {elder} was not [angry|cross|upset] at all. <praise>",
    ],
    "gifts": [
        "[a basket of|a pile of|fresh|two sacks of|a hat full of] [berries|apples|nuts|honey|flowers|pears|plums|figs]"
    ],
    "praise": [
        '"What {trait.a} {who} you are!" said {hero.his} {elder}.',
        "They all ate together, and no {food} had ever tasted [so good|better].",
    ],
    # --- a fear is overcome
    "fear": ["<afraid> <trial> <comfort> <courage>"],
    "afraid": [
        "But {hero.he} was [afraid|scared|terrified] of {fear}.",
        "Only one thing [frightened|scared] {hero.him}: {fear}.",
    ],
    "trial": [
        "One <weather> <day>, {hero.he} had to go to the {place} alone and <shook>.",
        "When {hero.his} {elder} sent {hero.him} to the {place}, {hero.he} <shook>.",
    ],
    "shook": _list("shook, hid, trembled, froze, shivered, fainted, hesitated, stopped, screamed, blushed"),
    "comfort": [
        '{hero.His} friend {friend} gave {hero.him} {look.a} {thing}. "<comforting>," <said> {friend}.',
        '"Take my {look} {thing}," <said> {friend}, {hero.his} best friend. "<comforting>."',
    ],
    "comforting": _list(
        "It will keep you safe, It makes me brave, It will bring you luck, Hold it tight, You can do it"
    ),
    "courage": [
        "{hero} held the {thing} and <moved> to the {place}. {hero.He} was not afraid of {fear} any more.",
        "With the {look} {thing}, {hero.he} forgot all about {fear}. {hero} and {friend} <celebrated together>.",
        "It worked! {hero} laughed at {fear} and gave the {thing} back to {friend}.",
    ],
    # --- something is built twice
    "building": ["<plan> <work> <collapse> <again>"],
    "plan": [
        "{hero.He} and {hero.his} friend {friend} decided to build {look.a} {building} {place.at} the {place}.",
        "One <weather> <day>, {hero.his} friend {friend} said,"
        ' "Let us build {look.a} {building} {place.at} the {place}."',
    ],
    "work": [
        "They used <soft stuff> and <soft stuff 2>.",
        "{friend} brought <soft stuff>, and {hero} brought <soft stuff 2>.",
    ],
    "soft stuff": _list("straw, paper, leaves, feathers, sand, grass, cloth, blankets, pillows, cardboard, moss, mud"),
    "soft stuff 2": _list(
        "sticks, branches, glue, string, ribbons, twigs, shells, old boxes, pine cones, jam, snow, socks"
    ),
    "collapse": [
        "But <disaster> <broke> the {building}. {friend} <wept>.",
        'But <disaster> came, and the {building} fell down. "Oh no!" <cried> {friend}.',
    ],
    "disaster": [
        "[the wind|the rain|a storm|a wave|a cow|a big dog|a goat|a flood|an earthquake|the snow|a clumsy bear]"
    ],
    "broke": _list("broke, smashed, crushed, knocked over, ruined, squashed, wrecked, toppled"),
    "again": [
        '"We will try again," <said> {hero}. This time they used <hard stuff>, and the {building} stood. <in it>',
        "{hero} fetched <hard stuff>, and they built an even better {building}. <in it>",
    ],
    "hard stuff": _list("bricks, stones, wood, nails, iron, logs, strong rope, planks, steel, clay, rocks, bolts"),
    "in it": [
        "{friend} and {hero} <celebrated together>.",
        "Everyone {place.at} the {place} <cheered> for {hero} and {friend}.",
    ],
    # --- something is saved up for
    "saving up": ["<longing> <chores> <shop>"],
    "longing": [
        "{hero.He} wanted {look.a} {thing} more than anything, but {hero.he} had only <few> coins.",
        "At the {place}, {hero.he} saw {look.a} {thing}. It cost <many> coins, and {hero.he} had only <few>.",
    ],
    "few": _list("two, three, four, five, six, seven"),
    "many": _list("ten, twelve, twenty, thirty, forty, fifty"),
    "chores": [
        "So {hero.he} <chore> for the <worker> and <chore 2> for {hero.his} {elder}.",
        "All <season>, {hero.he} <chore> for {hero.his} {elder} and <chore 2> for the <worker>.",
    ],
    "season": _list("spring, summer, autumn, winter, week, month, year"),
    "chore": _list(
        """swept floors, washed dishes, watered roses, peeled potatoes, picked cherries, carried water, chopped
        wood, polished boots, milked cows, fed chickens, raked leaves, pulled weeds"""
    ),
    "chore 2": _list(
        """ironed shirts, dusted shelves, ground flour, delivered letters, walked dogs, brushed horses, mended nets,
        scrubbed pots, stacked boxes, trimmed hedges, cleaned windows, sorted buttons"""
    ),
    "worker": _list(
        """baker, farmer, miller, potter, fisherman, tailor, blacksmith, doctor, king, queen, mayor, painter,
        sailor, shepherd, cook, librarian, gardener, carpenter, clown, pilot, barber, captain, knight,
        wizard"""
    ),
    "shop": [
        "At last, {hero.he} bought the {look} {thing}, and {hero} <used {thing.kind}> all day.",
        "But the {thing} was [sold|gone]! Then {hero.his} friend {friend} came with a box. In it was the {look}"
        " {thing}. {hero} <thanked> {friend}.",
        "{hero} <moved> to the shop and came home with the {look} {thing}. {hero.His} {elder} <cheered>.",
    ],
    "used toy": _list("played with it, pushed it, cuddled it"),
    "used clothes": _list("wore it, tried it on, twirled in it"),
    "used treasure": _list("admired it, looked at it, guarded it"),
    "used instrument": _list("played it, made music, practiced"),
    # --- a friend is made
    "new friend": ["<alone> <stranger> <invitation> <together>"],
    "alone": [
        "{hero.He} liked to {hobby}, but {hero.he} had nobody to play with.",
        "{hero.He} was new in town, and it was no fun to {hobby} alone.",
    ],
    "stranger": [
        "One <weather> <day>, {place.at} the {place}, {hero.he} saw a {friend.child} with {look.a} {thing}.",
        "Then a {friend.child} with {look.a} {thing} came to the {place}.",
    ],
    "invitation": [
        '"I am {friend}," said the {friend.child}. "Do you want to {hobby} with me?"',
        'The name of the {friend.child} was {friend}. "Can I hold your {thing}?" <said> {hero}. {friend} <nodded>.',
    ],
    "nodded": _list("nodded, smiled, laughed, agreed, blushed, grinned"),
    "together": [
        "So {hero} and {friend} went to {hobby} {place.at} the {place}.",
        "Now {friend} and {hero} {hobby} every <day>, and {friend} even lets {hero.him} hold the {look} {thing}.",
    ],
    # --- a noise is explained
    "strange noise": ["<noise> <guess> <look> <mystery solved>"],
    "noise": [
        "One <weather> night, {hero.he} heard a {noise} in the {room}.",
        "Every night, there was a {noise} in the {room}, and {hero} could not sleep.",
    ],
    "guess": [
        '"Is it a [ghost|monster|thief|dragon|witch|giant|pirate|goblin]?" {hero.he} <cried>.',
        "{hero.He} [hid|trembled|shivered] under the [bed|blanket|table|pillow].",
    ],
    "look": [
        "{hero.His} {elder} took {look.a} [lamp|candle|lantern|torch], and they <moved> to the {room}.",
        "With {look.a} {tool} in {hero.his} hand, {hero.he} <moved> to the {room}.",
    ],
    "mystery solved": [
        "It was only {plight.a} {creature} that wanted {taste.a} {food}. <pet>",
        'There sat {plight.a} {creature}. "The {noise} was me," <said> the {creature}. <pet>',
    ],
    "pet": [
        "{hero} made a bed for the {creature} in the {room}.",
        "Now the {creature} sleeps next to {hero}, and nobody fears the {noise} any more.",
    ],
}
