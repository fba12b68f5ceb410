"""Word lists of the demo world.

Every name and value below becomes exactly one tokenizer piece together with
its leading space (tokenizer.py checks that).  A small model copies one token
reliably; a value spelled with several pieces is far harder to recall.  That is
also why there are no numbers: the Qwen2 tokenizer splits them into digits.

The pools of subjects (places, people) and of values are disjoint, so a word
in a document is either what a fact is about or what it says, never both.
"""

_HEADS = ("On Vel Mar Tor Bel Har Kes Lin Dun Fen Gal Hol Jor Lor "
          "Nor Os Rav Tam Ul Wen").split()
_TAILS = "dar by wick holm ness ford stead mere gate vik".split()

# Invented places: syllables are shared, so the tokenizer needs few merges.
PLACES = [h + t for h in _HEADS for t in _TAILS]

PEOPLE = """
Ada Agnes Alba Alma Amos Anika Anna Anton Arno Astrid Barbara Bastian Beatrix
Berta Bianca Boris Bruno Carla Casper Cecilia Clara Clemens Conrad Cora Dagmar
Daria David Dora Edgar Edith Elena Eliza Elsa Emil Emma Erik Ernst Esther Eva
Fabian Felix Fiona Flora Florian Franz Frida Gerda Gideon Greta Gustav Hanna
Hans Hector Hedda Helena Henrik Hilda Hugo Ida Igor Ilse Ines Ingrid Irene Iris
Isaac Ivan Jana Jasper Johan Jonas Josef Judith Julia Julius Karin Karl Kira
Klara Konrad Lara Laura Lena Leo Leon Lidia Lisa Lothar Lotte Luca Lucia Ludwig
Luisa Magda Marcus Maria Marta Martin Mathilda Max Mila Mina Miriam Moritz Nadia
Nathan Nina Nora Olga Oscar Otto Paul Paula Petra Philip Rasmus Regina Renata
Robert Rolf Rosa Rufus Ruth Samuel Sara Sigrid Silas Simon Sofia Stella Sven
Tania Theo Thomas Tilda Tobias Ursula Vera Victor Viola Walter Wanda Werner
Willa Xenia Yara Yvonne Zelda Zora
""".split()

SURNAMES = """
Abbott Archer Baker Barlow Bishop Booth Burton Carver Chandler Clarke Cooper
Cross Dalton Dawson Draper Dyer Ellis Farmer Fisher Fletcher Foster Gardner
Gibson Glover Hale Hardy Harper Hooper Hunter Keller Lambert Lowell Marsh Mason
Mercer Miller Morgan Nash Norton Page Palmer Parker Porter Potter Reed Sadler
Sawyer Shaw Slater Spencer Tanner Taylor Thorne Turner Tyler Wade Walker Weaver
Webster Wells Wheeler Woods Wright York
""".split()

COLOURS = """
amber aqua azure beige black blue bronze brown copper coral cream crimson ebony
emerald gold green grey indigo ivory jade lilac magenta maroon navy ochre olive
orange pink purple red ruby russet scarlet silver teal turquoise umber violet
white yellow
""".split()

GOODS = """
barley bread butter candles cheese clay cloth coal cocoa coffee cotton flour
fruit fur glass grain hay hemp honey hops ice iron lace lamps lead leather
linen malt marble oats oil paper pearls rice rope rye salt sand silk slate soap
spices steel sugar tar tea timber tin tobacco wax wheat wine wool
""".split()

FLOWERS = """
aster bluebell broom clover crocus daisy elder fern foxglove gorse heather holly
hyacinth iris ivy jasmine juniper lavender lily lupin mallow marigold mint moss
myrtle nettle orchid peony poppy primrose rose rosemary sage snowdrop sorrel
tansy thistle thyme tulip vetch willow yarrow
""".split()

TRADES = """
baking banking brewing building carving cooking dyeing engraving farming fishing
forging gardening gilding hunting knitting mapping milling mining nursing
painting piloting plumbing pottery printing roofing sailing sculpting sewing
singing spinning tailoring tanning teaching thatching trading tuning weaving
welding writing
""".split()

DISHES = """
bacon beans biscuits cabbage cake carrots celery chowder cod crab curry custard
dumplings eel eggs figs goulash haddock ham herring jam kippers lamb leeks
lentils lobster mussels mutton noodles omelette onions oysters pancakes pasta
pears peas pie plums porridge prawns pudding pumpkin rhubarb risotto salad
salmon sausages shrimp soup spinach squid stew toast trout tuna turnips veal
waffles walnuts
""".split()

BOATS = """
Adventure Albatross Amazon Antelope Arrow Atlas Aurora Avalon Bounty Buccaneer
Calypso Challenger Comet Condor Corsair Courage Curlew Cygnet Dauntless Defiance
Discovery Dolphin Dragon Eclipse Endeavour Enterprise Falcon Fortune Galatea
Gannet Griffin Halcyon Harmony Heron Hope Horizon Invincible Jackdaw Kestrel
Lapwing Liberty Lightning Magpie Mariner Meteor Mistral Neptune Nautilus Orion
Osprey Pandora Pegasus Phoenix Pioneer Plover Raven Resolute Revenge Rover
Sandpiper Seagull Shark Sirius Skylark Solace Sparrow Spirit Swallow Swift
Tempest Thunder Trident Triumph Unicorn Valiant Vanguard Venture Victory
Wanderer Zephyr
""".split()

WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TIMES = "morning noon evening night".split()
WEATHER = ("light rain|heavy rain|thick fog|light fog|calm sea|rough sea|"
           "clear sky|strong wind|fair wind|fresh snow").split("|")

# Ordinary English, for questions that have nothing to do with any document.
COMMON = """
about after again air all also always and answer any are around ask away back
be because been before begin best better big bird book both boy bring but buy
by call came can car cat change city close cold come could country cut day did
different dinner do dog door down draw each early earth east eat end enough
even ever every example explain eye face fact fall family far fast father feel
few find fire first fish five follow food for found four friend from game
garden get girl give go good great group grow had hand hard has have he head
hear help her here high him his home horse house how hundred idea if in is it
joke just keep kind king know land language large last late learn leave left
letter life light like line list little live long look love made make man many
map may mean money moon more most mother mountain move much music must my name
near need never new next night no north not now number of off often old on once
one only open or other our out over page part people picture place plan play
please poem point problem program put question quick quiet rain read really
right river road room round run said same say school sea second see sentence
set she ship short should show sing sister six sky sleep small so some song
soon south speak star start stay still stop story street strong such summer sun
sure table take talk tell ten than thank that the their them then there these
they thing think this those three through time to today together too town train
translate travel tree true try turn two under until up us use very voice wait
walk want war was watch water way we week well went were west what when where
which white who why will wind winter wish with woman word work world would
write year yes yesterday you young your
""".split()

VALUES = {
    "surname": SURNAMES, "colour": COLOURS, "boat": BOATS, "goods": GOODS,
    "flower": FLOWERS, "trade": TRADES, "dish": DISHES,
}
# "iris" and "Iris" are different words; check the rest for real clashes.
_all = PLACES + PEOPLE + [v for pool in VALUES.values() for v in pool]
assert len(_all) == len(set(_all)), [w for w in _all if _all.count(w) > 1]
