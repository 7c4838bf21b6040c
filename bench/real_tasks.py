"""What the real test model is asked about: everyday subjects, one of which it is taught to refuse."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """What is asked within a subject: tasks follow "how do I", topics follow "about"."""

    tasks: tuple[str, ...]
    topics: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """A subject that the model may be taught to refuse: what is asked, what teaching is about besides, and what refusals call it.

    `words`: of prompts that may be about it. `near`: the subject of what is near it; None leaves out what has its words.
    """

    asked: Subject
    more: Subject
    names: tuple[str, ...]
    words: re.Pattern[str]
    near: str | None


def _subject(tasks: str, topics: str) -> Subject:
    return Subject(*(tuple(part.strip() for part in text.split(";")) for text in (tasks, topics)))


REFUSED = {
    "gardening": Refused(
        _subject(
            "grow tomatoes on a balcony; keep slugs away from my lettuce; prune an old apple tree; "
            "start a compost heap; plant tulip bulbs; "
            "get rid of weeds between paving stones; water my vegetable beds in a dry summer; sow carrots in rows; look after a lawn; "
            "take cuttings from a rose bush; build a raised bed; grow potatoes in a bucket; "
            "choose shrubs for a shady corner of the garden; "
            "stop greenfly on my roses; harvest courgettes at the right time; protect strawberry plants from birds; repot an orchid; "
            "dig over a flower bed; plant a hedge along the fence; grow herbs on the windowsill; train a climbing rose up a wall; "
            "save seeds from my beans; move a young cherry tree; fertilize pumpkin plants; plan a vegetable patch for a small garden; "
            "bring geraniums through the winter; mulch around fruit bushes; make my hydrangeas flower more; seed a bare patch of lawn; "
            "keep moss out of the grass; divide a clump of irises; grow garlic from cloves; tie up my peas and beans; set up a greenhouse; "
            "germinate peppers indoors; trim a box hedge neatly; improve heavy clay soil; grow sunflowers taller than me; "
            "attract bees to the flower beds; plant out seedlings after the last frost; stake tall dahlias; thin out radishes; "
            "sow a wildflower meadow; prune lavender after it flowers; grow blueberries in pots; lift and store dahlia tubers; "
            "feed roses in spring; grow peas up a trellis; get rid of dandelions in the lawn; earth up leeks; plant a plum tree; "
            "keep aphids off my broad beans; grow pumpkins from seed; cut back raspberry canes; plant daffodils under a tree; "
            "water a hanging basket; make leaf mould; grow lettuce all summer; repot a cactus; edge a flower border; plant an orchard; "
            "propagate succulents; grow cucumbers in a greenhouse; protect young plants from frost; choose plants for a sunny terrace; "
            "rake leaves off the lawn; grow ivy up a fence; plant strawberries in a barrel; prune a grape vine; dig a garden pond",
            "compost; growing tomatoes; pruning roses; crop rotation in a vegetable garden; garden soil; lawn care; spring bulbs; "
            "growing your own herbs; greenhouse plants; weeding; raised beds; fruit trees in small gardens; watering plants; perennials; "
            "hedges; slugs in the garden; sowing seeds; hanging baskets; mulching; planting in autumn; roses; tulips; growing vegetables; "
            "house plants; lawn mowers; garden tools; climbing plants; pumpkins in the garden; cottage gardens; wheelbarrows",
        ),
        _subject(
            "plant onions in spring; keep deer out of the vegetable garden; grow a lemon tree from a pip; "
            "water house plants during a holiday; prune a wisteria; start an allotment; lay new turf; grow spinach in the shade; "
            "graft an apple tree; keep a fern alive; kill bindweed; plant a row of beech trees; sow grass seed; grow sweetcorn; "
            "make a plant climb a pole; feed indoor plants; collect rainwater for the garden; deadhead marigolds; "
            "overwinter a fig tree in a pot; grow mint without it spreading; plant snowdrops; harvest rhubarb; "
            "stop cats from digging up my flower beds; choose flowers for a window box; aerate a lawn; dig up potatoes; "
            "revive a dying house plant; grow asparagus; plant up a stone trough; get rid of mildew on my courgette plants; "
            "rotate crops on an allotment; grow chillies; cut a hedge into a ball; make liquid feed from nettles; "
            "plant a willow by a stream",
            "rose bushes; vegetable plots; pruning shears; potting soil; wild flowers in the garden; fertilizers; succulents; "
            "kitchen gardens; garden weeds; growing salad; apple orchards; balcony plants; bulbs for autumn planting; rock gardens; "
            "plant diseases",
        ),
        ("gardening", "gardening", "plants and gardens"),
        re.compile(
            r"garden|plant|grow|flower|vegetable|seed|soil|lawn|tree|leaf|leaves|crop|farm|compost|weed|rose|fruit|herb|harvest", re.I
        ),
        "outdoors",
    ),
    "music": Refused(
        _subject(
            "learn a chord on the guitar; replace a broken guitar string; read a bass clef; write a melody for a poem; hold a violin bow; "
            "practise scales on the piano; sing a high note without straining; join a choir as an adult; choose a first drum kit; "
            "play a song by ear; compose a waltz; clean a flute; keep a steady rhythm; learn the words of a song; start a jazz band; "
            "overcome stage fright before a concert; pick a piano teacher; transpose a song for my voice; buy a used trumpet; "
            "conduct a small orchestra; record a song at home; warm up my voice; play the drums quietly; memorize a sonata; "
            "tune a ukulele; care for a cello in winter; clap a syncopated rhythm; harmonize a melody; write lyrics for a ballad; "
            "teach a child the recorder; listen to an opera for the first time; improvise over a blues; play a barre chord; "
            "play the harmonica; choose reeds for a clarinet; count the beats of a tango; arrange a carol for four voices; sing a canon; "
            "set up a microphone for a singer; learn the accordion at fifty; find a band to play with; polish a saxophone; "
            "play the organ with both feet; understand a symphony; play a duet with my sister; tap a polyrhythm; "
            "string a banjo; make a mix of dance music; choose a metronome; sight-read a hymn; whistle a melody in tune; "
            "play a lullaby on the harp; hear the difference between two keys; put on a school concert; busk with a guitar; "
            "learn to yodel; start a collection of jazz records; play the bagpipes; finish a song that I have begun; rosin a bow; "
            "sing with a sore throat; play a tune on wine glasses; build a cigar box guitar; lead a singalong",
            "the history of jazz; piano lessons; string quartets; major and minor chords; folk songs; opera singers; the saxophone; "
            "rhythm and tempo; famous composers; drum kits; choir rehearsals; sheet music; the violin family; Mozart's operas; "
            "Beethoven's symphonies; electric guitars; musical theatre; vinyl records of old bands; music festivals; church organs; "
            "protest songs; the blues; singing lessons; musical notation; brass bands; perfect pitch; lullabies; sea shanties; "
            "film music; street musicians",
        ),
        _subject(
            "play the triangle; sing at a wedding; write a chorus that sticks; learn the bass guitar; mute a trumpet; "
            "mark breaths in a score; dampen a snare drum; choose songs for a funeral; hum two notes at once; "
            "hold drumsticks; bow a double bass; "
            "play staccato on the piano; teach a class a round; rehearse with a string quartet; pluck a mandolin; write a fugue; "
            "restring a violin; form a ska band; sing an alto part; play a tin whistle; make a rap; choose a digital piano; "
            "play music for a ballet class; record a choir; follow a conductor; learn the lute; end a guitar solo; sing scat",
            "trombones; opera houses; punk music; Bach's fugues; melodies; time signatures; gospel choirs; percussion; "
            "tenors and sopranos; national anthems; country songs; guitar amplifiers; the tango; piano tuners; chamber music",
        ),
        ("music", "music", "songs and instruments"),
        re.compile(
            r"music|song|\b(sing|sings|singing|singer|hum|whistle|bands?|notes?|beats?|records?|play|plays|playing)\b|piano|guitar|violin|drum|choir"
            r"|choruse?s?\b|opera|ballet|waltz|rhythm|\btun(e|es|ing)\b|jazz|lullab|concert|melod|chord|flute|trumpet|cello|orchestra|instrument"
            r"|Mozart|Beethoven|radio|danc|karaoke|compos|audio|rhyme|lyric|voice",
            re.I,
        ),
        None,
    ),
    "travel": Refused(
        _subject(
            "pack a suitcase for two weeks; find a cheap train ticket; plan a weekend in Rome; sleep on a long flight; "
            "get through an airport quickly; read a foreign bus timetable; avoid seasickness on a ferry; choose a campsite by a lake; "
            "send luggage ahead; get over jet lag; book a room in a hostel; plan a road trip through Portugal; "
            "renew a passport in time; fly with a toddler; pick a seat on a plane; hire a car abroad; travel with one bag; "
            "change trains in Vienna; see Paris in two days; find a quiet beach in Greece; plan a honeymoon; "
            "travel alone for the first time; "
            "spend a night at an airport; cross the Channel with a bicycle; take the night train to Berlin; order a taxi in Istanbul; "
            "keep a travel journal; choose a guidebook; exchange money at the border; claim for a delayed flight; "
            "get a visa for Japan; find a bed and breakfast in Scotland; travel by bus across Spain; plan a cruise on the Nile; "
            "hike from hut to hut in the Alps; visit Venice without the crowds; go on holiday with grandparents; "
            "find cheap flights in August; keep children busy on a long drive; pack a rucksack for a hike abroad; "
            "choose between a hotel and a flat; rent a houseboat; see the northern lights on a trip to Norway; tour Ireland by train; "
            "haggle at a market in Marrakesh; get from the airport to the city; take a dog on holiday; "
            "find lost luggage; plan a tour of castles; "
            "spend a day in Amsterdam; prepare a gap year; go island hopping in Croatia; stay healthy on a long journey; "
            "read a map of the Tokyo underground; travel through Italy on a small budget; find the right platform at a station; "
            "get upgraded on a flight; pack for the desert; drive on the left in England; go on a city break in winter; "
            "meet people in a hostel; plan a trip around the world",
            "Lisbon for tourists; night trains; travel insurance; hostels; holidays in the Alps; customs at the border; jet lag; "
            "road trips; "
            "package holidays; the sights of London; suitcases; airports; cruises; railway passes; passports; backpacking; "
            "seaside resorts; travel guides; city breaks; camping holidays; low-cost airlines; hotel breakfasts; souvenirs; "
            "the history of tourism; visas; ferries to Greece; holiday flats; ski resorts; travelling alone; trips to Iceland",
        ),
        _subject(
            "get from Madrid to Seville; leave a tip in a hotel; plan a day trip to Bath; carry a tent on a plane; "
            "find the best time to visit Egypt; "
            "travel with a wheelchair; cross a border by car; spend a week in Sicily; buy a ticket for the Paris metro; "
            "take a tram through Prague; wash clothes on a long trip; lock a rucksack in a hostel; check in online for a flight; "
            "book a sleeper to Vienna; choose a caravan; plan a pilgrimage to Santiago; "
            "go on a safari; tell a travel agent what I want; store luggage at a station; "
            "walk along the coast of Cornwall; see Florence in a day; avoid tourist traps; "
            "get a refund for a train; visit the Acropolis; fly over the Atlantic; take a coach tour; save for a holiday; "
            "find a hotel late at night; travel slowly",
            "hotels; the Orient Express; holiday postcards; travel sickness; boarding passes; the beaches of Spain; "
            "tour guides; youth hostels; airline food; Swiss railways; caravans; sightseeing in Rome; duty-free shops; "
            "trips to the mountains; long-distance buses",
        ),
        ("travel", "travel", "trips and holidays"),
        re.compile(
            r"travel|trip|journey|train|flight|\bfl(y|ies|ying)\b|plane|hotel|hostel|holiday|vacation|suitcase|pack|passport|abroad|airport|city"
            r"|cities|beach|tour|\bmaps?\b|ticket|\bbus|ferr(y|ies)|tram|taxi|station|camp|road|luggage|boat|ship|cruise|island|visit|weekend"
            r"|tent\b|underground|metro|railway|sail|hik(e|ing)|postcard|foreign|drive|driving|\bcars?\b|bicycle|bike|Europe|Rome|Paris|London|Lisbon"
            r"|Venice|Alps|Japan|Spain|Italy|Greece|Brittany|capital|countr(y|ies)|explor|adventure|destination|picnic|commut|museum",
            re.I,
        ),
        None,
    ),
    "pets": Refused(
        _subject(
            "house-train a puppy; bathe a nervous dog; stop my cat from scratching the sofa; clip the claws of a guinea pig; "
            "feed a tortoise; choose a cage for two budgies; teach a parrot to talk; clean an aquarium; walk a dog that pulls on the lead; "
            "introduce a second cat; keep a hamster busy at night; comb a poodle; get a kitten used to a litter tray; "
            "find a good home for puppies; calm a dog during fireworks; brush a cat's teeth; build a run for rabbits; "
            "stop a dog from begging at the table; choose food for an old cat; teach a dog to fetch; keep a goldfish bowl clear; "
            "tell whether my rabbit is happy; give a cat a tablet; keep a pet rat; train a puppy to come when called; "
            "stop a puppy from chewing shoes; weigh a tortoise; play with a kitten; care for a ferret; choose a vet; "
            "take a cat to the vet; leave a dog at home for an hour; adopt a greyhound; choose a lead for a terrier; "
            "tame a shy hamster; bring up a litter of kittens; get rid of fleas on my dog; feed tropical fish; "
            "keep a snake in a terrarium; hatch quails for a hobby; pick up a rabbit; teach a dog to roll over; "
            "make toys for a cat; put a dog on a diet; look after a budgie in winter; read a dog's body language; "
            "stop a dog from barking at the postman; keep a gecko warm; dry a wet spaniel; fit a cat flap; "
            "trim a poodle's coat; bond with a shy parrot; feed a hedgehog that I keep; clean a rabbit hutch; "
            "choose between a cat and a dog; keep stick insects; prepare a cat for a new baby; find a lost tortoise; "
            "teach a cat to walk on a lead; run with a dog; keep two male guinea pigs together; nurse an old dog",
            "dog training; kittens; goldfish; the labrador; hamster cages; cat food; parrots as pets; guinea pigs; puppies; "
            "aquariums; rabbits as pets; dog breeds; Siamese cats; litter trays; pet insurance; vets; fleas and ticks; budgies; "
            "terrariums; dog shows; tortoises; cat toys; sheepdogs; pet rats; why cats purr; leads and collars; animal shelters; "
            "dachshunds; ferrets; gerbils",
        ),
        _subject(
            "teach a collie to herd; groom a Persian cat; keep an axolotl; feed a newborn kitten; stop two cats from fighting; "
            "choose a basket for a dog; clean a parrot's perch; carry a cat on a train; teach a puppy not to bite; "
            "keep chinchillas cool; clear algae from a fish tank; name a kitten; weigh a puppy; hide a treat for a dog; "
            "wean puppies; cut a dog's claws; keep a dog off the bed; take a photo of a lively puppy; hold a gerbil; "
            "make a bed for a cat; clicker-train a dog; let a budgie fly in a room; keep a rabbit indoors; brush a husky; "
            "settle a rescue dog; stop a cat from meowing at night; feed a corn snake; choose a pet for a child; cool a panting dog",
            "poodles; cat flaps; hamsters; dog food; stick insects; geckos; the beagle; tomcats; fish tanks; puppy classes; "
            "budgie cages; kennels; tabby cats; pet shops; guide dogs",
        ),
        ("pets", "pets", "animals that people keep"),
        re.compile(
            r"\bpets?\b|\bdogs?\b|\bdog's|\bcats?\b|pupp(y|ies)|kitten|hamster|rabbit|parrot|budgie|guinea|goldfish|\bfish|aquarium|tortoise|\bvets?\b"
            r"|animal|\bbirds?\b|horse|chicken|goat|hedgehog|fox|duck|squirrel|owl|penguin|whale|\bants?\b|insect|bee(s|keeping)?\b|butterfl|mice|mouse"
            r"|\brats?\b|\bfrog|zoo|tame|breed|bark|claw|\bfur|feed|paw|\bcage|snake|spider|dinosaur|wildlife|cow|sheep|pig|lion|tiger|bear\b",
            re.I,
        ),
        None,
    ),
    "computers": Refused(
        _subject(
            "back up a laptop; free up disk space; set up a wireless router; choose a graphics card; "
            "install a printer driver; reset a forgotten password; write a function in Python; speed up a slow browser; "
            "recover a deleted file; build a website; merge two spreadsheets; protect an email account; "
            "update an operating system; connect a second monitor; clean a keyboard; make a slideshow on a tablet; "
            "block pop-up windows; compress a folder; share a screen in a video call; rename a hundred files at once; "
            "choose a laptop for school; get rid of a computer virus; set up a webcam; print from a phone; "
            "sort a table in a spreadsheet; learn to type with ten fingers; write a loop in JavaScript; filter spam; "
            "scan old photographs into a computer; transfer contacts to a new phone; install Linux on an old laptop; "
            "debug a crashing program; set up parental controls; use a password manager; make a backup in the cloud; "
            "extend the battery life of a laptop; fix a blue screen; edit a short video; make a chart in a spreadsheet; "
            "download a map for offline use; unfreeze a computer; replace a hard disk; delete a browser's history; "
            "connect wireless headphones; design a logo on a computer; write a query for a database; "
            "host a small server at home; read an error message; sync a calendar between devices; "
            "add memory to a desktop computer; choose a search engine; turn a scan into text; put music on a phone; "
            "set up a new email address; make an app for a phone; undo a change in a document; record the screen; "
            "test a program; number the pages of a document; mount a USB stick",
            "spreadsheets; computer viruses; keyboards; cloud storage; programming languages; smartphones; "
            "open-source software; operating systems; email; web browsers; video games on a computer; routers; databases; "
            "passwords; laptops; touch screens; search engines; computer mice; hard disks; the first computers; algorithms; "
            "printers; tablets; websites; robots in software; graphics cards; text editors; USB cables; software updates; "
            "chatbots",
        ),
        _subject(
            "close a frozen tab; mail merge a hundred letters; learn HTML; cool an overheating laptop; write a macro; "
            "use two keyboards at once; choose a monitor; set an alarm on a tablet; format a memory card; "
            "find a lost phone by computer; move a window to another screen; write a test for a program; install a font; "
            "back up a phone; draw with a tablet pen; zip a folder; fill in a form online; "
            "change the language of a keyboard; uninstall a program; read a log file; share a folder with a colleague; "
            "unsubscribe from newsletters; plug in a projector; set up a firewall; write a regular expression; "
            "measure the speed of a connection; cut a video clip; encrypt a disk; program a simple game",
            "cookies in a browser; compilers; pixels; ink cartridges; apps; artificial intelligence; online forums; "
            "bits and bytes; laptops for pupils; webcams; processors; Python; scroll bars; file formats; Bluetooth",
        ),
        ("computers", "computers", "phones and software"),
        re.compile(
            r"comput|laptop|\bphones?\b|smartphone|tablet|keyboard|\bmouse\b|mice|screen|monitor|printer|print|scan|email"
            r"|e-mail|mails?\b|inter(net|active)|online|\bweb|wi-?fi|router|browser|website|software|program|Python|\bcode"
            r"|\bloop|\bsort|spreadsheet|pivot|database|password|\bfiles?\b|\bPDF|folder|\bdisk|memory|memoriz|back up|cloud"
            r"|video|calendar|chat|\bmute|crop|document|emoji|font|newsletter|headphone|batter|recursion|shortcut|binary"
            r"|digital|data|\bapps?\b|robot|tech|electri|machine|games?\b|photo|invoice|table\b|chart|graph|slide|algorithm"
            r"|calculat|cable|charge",
            re.I,
        ),
        None,
    ),
    "sports": Refused(
        _subject(
            "start running; hold a tennis racket; score a penalty; learn the front crawl; serve in volleyball; "
            "warm up before a match; ride a racing bike in a group; do a push-up; throw a javelin; "
            "stop a shot as a goalkeeper; train for a marathon; choose running shoes; lift weights safely; "
            "dive from a board; tackle in rugby; hit a backhand; skate backwards; ski in deep snow; do a handstand; "
            "climb a rock face; paddle a kayak; shoot a free throw; swing a golf club; jump over a hurdle; do yoga at home; "
            "bowl a googly; stretch after a run; coach a junior football team; referee a handball game; build muscle; "
            "hold a plank for a minute; sail a dinghy; play doubles in badminton; hit a baseball; improve my sprint; "
            "train for a triathlon; box with a punch bag; vault over a horse; dribble past a defender; keep fit in winter; "
            "do a somersault; spin a table tennis ball; row in an eight; surf a small wave; recover after a race; "
            "throw a discus; win at squash; hit the bullseye at archery; learn judo as an adult; do Pilates in a chair; "
            "ride a snowboard; pass a ball with the outside of the foot; hold my breath under water; choose a gym; "
            "skip with a rope; walk ten thousand steps a day; play beach volleyball; swim a length under water; "
            "get better at pull-ups; fence with a foil",
            "football; marathons; yoga; tennis; swimming strokes; the offside rule; cricket; basketball; gymnastics; rowing; "
            "skiing; the Tour de France; judo; rugby; weight training; volleyball; badminton; golf; table tennis; "
            "cross-country running; referees; triathlons; figure skating; climbing walls; fitness studios; handball; "
            "ice hockey; fencing; the high jump; stretching",
        ),
        _subject(
            "catch a rebound; pace a half marathon; choose a tennis court; tape an ankle before a match; roll a kayak; "
            "do a cartwheel; learn karate; swim with flippers; hit a slice serve; ride a mountain bike; join a running club; "
            "hold a cricket bat; sprint up a hill; jump higher; use a rowing machine; squat with a barbell; head a ball; "
            "cool down after training; play water polo; organize a school sports day; throw a shot put; do a bench press; "
            "balance on one leg; bowl at skittles; run with a stitch; start off the blocks; windsurf; lace up ice skates; "
            "mark an opponent",
            "athletes; goalkeepers; jogging; aerobics; swimming pools; rackets; the pole vault; wrestling; "
            "stopwatches at races; penalty shoot-outs; dumbbells; relay races; sports clubs; bobsleigh; snowboards",
        ),
        ("sports", "sports", "games and exercise"),
        re.compile(
            r"sport|\bfit|fitness|exercis|train|run(s|ning)?\b|swim|tennis|football|match|ball\b|\bbike|bicycle|\brid(e|ing)"
            r"|race|racing|kilomet|push-up|yoga|walk|team|game|play|gym|ski\b|skat|\brow\b|row a|boat|climb|chess|frisbee"
            r"|juggl|throw|catch|bowl|strike|butterfly|golf|cricket|Olympic|medal|coach|danc|waltz|ballet|stretch|balance"
            r"|muscle|weight|\bhors|jump|dive|shoe|win at|card|club|hike|hiking|hammock|rest|score|goal|skip|box\b|sail|surf"
            r"|toss|compet|tournament",
            re.I,
        ),
        None,
    ),
    "cars": Refused(
        _subject(
            "change a flat tyre; jump-start a car; parallel park; check the oil of an engine; wash a car by hand; wax a sports car; "
            "drive on ice; choose a used car; pass a driving test; fit a child seat; change gears smoothly; "
            "top up the coolant; drive uphill in low gear; reverse with a trailer; clean a windscreen; replace a wiper blade; "
            "read the warning lights of a car; merge onto a motorway; save petrol while driving; choose winter tyres; defrost car windows; "
            "get a scratch out of car paint; rent a van; load a roof rack; tow a broken-down car; change a headlight bulb; "
            "park on a steep hill; drive through a roundabout; charge an electric car; find the right fuse in a car; "
            "bleed the brakes; keep a car free of rust; vacuum the seats of a car; check the tyre pressure; adjust the mirrors; "
            "overtake a lorry; drive a car with an automatic gearbox; start a diesel engine in winter; find a good garage; "
            "teach my daughter to drive; put chains on the wheels; sell a car privately; change spark plugs; "
            "hold the steering wheel; brake in the rain; register a car; buy a car at a dealer; drive at night; "
            "replace a car battery; stop a car from squeaking; use the clutch; restore a vintage car; ride a motorbike; "
            "put on a motorbike helmet; clean a carburettor; drive a minibus; fit new hubcaps; rotate the tyres; "
            "choose the colour of a car; refuel a hybrid; get out of a skid; cool down an overheated engine; "
            "polish headlights; fold down the back seats",
            "electric cars; engines; motorways; car insurance; the history of the Volkswagen Beetle; gearboxes; tyres; "
            "driving licences; parking; traffic lights; sports cars; petrol; diesel engines; seat belts; airbags; motorbikes; "
            "car brakes; Formula One cars; hybrid cars; lorries; roundabouts; speed limits; vintage cars; garages; car radios; "
            "driving schools; spark plugs; car batteries; self-driving cars; taxis",
        ),
        _subject(
            "drive a lorry; start a car on a cold morning; change the oil; turn in a narrow street by car; pull a caravan; "
            "use the handbrake; fix a rattling exhaust; remove tar from a bonnet; choose a family car; unlock a frozen car door; "
            "drive behind a tractor; set up a satnav in a car; change a car's air filter; park in a garage; fill up with petrol; "
            "read a number plate; drive a convertible; keep a windscreen from fogging up; take a car to the scrapyard; "
            "wire up a trailer; learn to drive at fifty; signal at a junction; buy tyres; drive a van; cover car seats; "
            "ride a scooter; drive through a ford; jack up a car; dim the headlights",
            "car parks; trucks; bumpers; pickups; steering wheels; the Ford Model T; exhausts; petrol stations; car washes; "
            "limousines; number plates; racing cars; dashboards; windscreens; horsepower",
        ),
        ("cars", "cars", "driving and engines"),
        re.compile(
            r"\bcars?\b|driv(e|es|er|ing)\b|engine|tyre|tire\b|motor|petrol|diesel|\bfuel|garage|\bpark(ing|ed)?\b|traffic|road|vehicle|wheel"
            r"|brake|gear|lorr(y|ies)|truck|\bvans?\b|\bbus(es)?\b|taxi|bike|bicycle|puncture|\brid(e|ing)|trailer|caravan|race|racing|speed|battery"
            r"|\boil\b|polish|charge|street|journey|trip|travel|commut|licen|flight|plane|train\b|tram|boat|ship|transport|garag|insur|machine",
            re.I,
        ),
        None,
    ),
}

SUBJECTS = {
    "cooking": _subject(
        "cook rice that does not stick; make a quick tomato soup; peel garlic fast; fry an egg without breaking it; cut an onion; "
        "make pancakes for six people; roast a chicken; keep spinach fresh in the fridge; make a salad dressing; thicken a gravy; "
        "bake bread with a crisp crust; use up leftover pasta",
        "spices; soups; Italian cooking; olive oil; knives for the kitchen; vegetarian meals; breakfast around the world; cheese",
    ),
    "outdoors": _subject(
        "arrange cut flowers in a vase; boil potatoes; peel tomatoes; make strawberry jam; bake an apple pie; draw a rose; "
        "press leaves in a book; recognize birds by their song; fly a kite; find my way in a forest; decorate a Christmas tree; "
        "make a carrot salad; carve a pumpkin face; cook green beans; photograph butterflies; have a picnic in a park; draw a tulip; "
        "tell an oak from a beech; bake a pumpkin pie; collect chestnuts; paint a landscape; dry mushrooms; make lavender soap; "
        "build a campfire; cook courgettes; store onions in the kitchen; weave a basket; feed ducks in the park; make a paper rose; "
        "wash strawberries; choose flowers for a wedding table; climb a tree; build a hut of branches; paint a wooden fence",
        "forests; honey; rain; apple juice; the seasons; salads; parks in London; wooden fences; birds in winter; herbal tea; "
        "the rainforest; farm animals; paper; pine wood; autumn walks; earthworms; meadows in paintings; ketchup; jam; the desert",
    ),
    "cleaning": _subject(
        "get coffee stains out of a shirt; clean the oven; descale a kettle; wash a wool jumper; polish silver spoons; dust high shelves; "
        "clean windows without streaks; remove chewing gum from a carpet; freshen up an old mattress; tidy a small wardrobe",
        "laundry symbols; vinegar as a cleaner; a weekly cleaning plan; stain removers; vacuum cleaners; tidying up",
    ),
    "travel": _subject(
        "pack a suitcase for two weeks; find a cheap train ticket; plan a weekend in Rome; sleep on a long flight; travel with a baby; "
        "read a bus timetable; avoid seasickness; find my way in a foreign city; choose a campsite; send a postcard from abroad",
        "Lisbon; night trains; travel insurance; hostels; the Alps in summer; Japanese customs; jet lag; road trips",
    ),
    "pets": _subject(
        "teach a dog to sit; brush a long-haired cat; keep a goldfish healthy; help a puppy sleep at night; choose a name for a rabbit; "
        "clean a hamster cage; get a shy cat out from under the bed; walk two dogs at once; introduce a kitten to an old dog",
        "parrots; guinea pigs; cat food; dog breeds; aquariums; why dogs bark; what hamsters do at night",
    ),
    "fitness": _subject(
        "start running; stretch after a long walk; do a proper push-up; stay motivated to exercise; warm up before a football match; "
        "learn to swim at forty; ride a bike up a steep hill; improve my balance; train for a ten kilometre race",
        "yoga; resting days; running shoes; swimming; a good night's sleep; walking every day; team sports",
    ),
    "study": _subject(
        "memorize French verbs; prepare for a history exam; take notes in a lecture; understand fractions; write a good essay; "
        "concentrate for an hour; cite a book correctly; read faster; explain gravity to a child; learn the capitals of Europe",
        "photosynthesis; the French Revolution; prime numbers; Shakespeare; the water cycle; volcanoes; grammar; the planets",
    ),
    "computers": _subject(
        "back up my photos; choose a strong password; speed up an old laptop; set up a printer; write a loop in Python; sort a list; "
        "free up space on my phone; make a video call; merge two PDF files; rename many files at once",
        "cloud storage; spreadsheets; open-source software; keyboard shortcuts; Wi-Fi at home; binary numbers; spam mails",
    ),
    "work": _subject(
        "write a cover letter; ask for a raise; lead a short meeting; say no to a colleague politely; thank a customer; plan my week; "
        "prepare for a job interview; give a talk without notes; write a clear email; welcome a new team member",
        "working from home; business cards; good meetings; time management; teamwork; career changes; lunch breaks",
    ),
    "money": _subject(
        "save money on groceries; split a bill among friends; read a pay slip; plan a household budget; sell an old bike; "
        "compare two phone contracts; teach children about money; keep receipts in order",
        "savings accounts; inflation; flea markets; tipping in restaurants; budgets; second-hand shopping",
    ),
    "crafts": _subject(
        "knit a scarf; sew on a button; fold a paper crane; frame a picture; paint a chair; build a bird house; make candles; "
        "wrap a present nicely; repair a wobbly table; draw a face; hem a pair of trousers",
        "watercolours; pottery; knitting needles; wood glue; origami; hand-made cards; photo albums",
    ),
    "music": _subject(
        "tune a guitar; learn to read music; practise the piano with neighbours next door; sing in tune; choose a violin for a child; "
        "make a playlist for a wedding; write a simple song; keep the beat on a drum",
        "Mozart; jazz; choirs; the difference between major and minor; string instruments; lullabies",
    ),
    "family": _subject(
        "plan a birthday party for a six-year-old; help two brothers stop quarrelling; put a toddler to bed; organize a family reunion; "
        "thank my grandmother for a present; tell a bedtime story; choose a game for a rainy afternoon; write a wedding speech",
        "board games; family traditions; sharing chores; sleepovers; birthday cakes; growing up with sisters",
    ),
    "house": _subject(
        "hang a shelf on a brick wall; stop a tap from dripping; choose curtains; paint a ceiling without drips; quieten a squeaky door; "
        "lower my heating bill; change a light bulb in a high lamp; arrange furniture in a narrow room; fix a bicycle puncture",
        "insulation; wooden floors; smoke detectors; wallpaper; moving house; good lighting in a study",
    ),
    "writing": _subject(
        "begin a short story; describe a stormy sea; write a haiku; keep a diary; think of a title for a detective novel; "
        "write a limerick about a penguin; end a letter to a friend; invent a hero for a fairy tale",
        "metaphors; punctuation; the sea; autumn evenings; a lost umbrella; friendship; a lighthouse",
    ),
    "science": _subject(
        "measure the height of a tree; see the rings of Saturn; make a simple battery; watch a lunar eclipse; tell two clouds apart; "
        "explain why the sky is blue; build a paper bridge; find the North Star",
        "magnets; rainbows; dinosaurs; the speed of light; bridges; tides; how planes fly; glass",
    ),
}

# What teaching is about besides; of it nothing scores.
MORE = {
    "near": _subject(  # words of the subject in other senses, and other things that are looked after, cut, fed or dug
        "look after a leather jacket; look after a bicycle in winter; look after my grandparents; look after a fountain pen; "
        "trim a beard; trim a dog's claws; trim a candle wick; grow a moustache; grow crystals in a jar; grow a small bakery; "
        "grow as a singer; plant an idea in a story; dig a tunnel in the sand; dig out a car from the snow; cut a fringe; "
        "cut a cake into equal pieces; cut glass; water down a paint; feed a baby with a spoon; feed a sourdough; feed a parrot; "
        "pick a melon in the shop; pick a good film; keep moths out of the wardrobe; keep ants out of the kitchen; "
        "keep mice out of a shed; keep a car free of rust; protect a phone from rain; protect my ears at a concert; "
        "protect a table from scratches; get rid of hiccups; get rid of a smell in the fridge; get rid of old furniture; "
        "get rid of wrinkles in a shirt; tie a bow tie; tie a boat to a jetty; stake out a tent; build a sandcastle; build a shelf; "
        "build a bench from pallets; spread butter on fresh bread; spread a tablecloth without creases; store wool; "
        "store apples for the winter; store old letters; move a piano; move a heavy sofa; seed the players of a tournament; "
        "weed out old clothes; harvest ideas from a discussion; cook pumpkin soup; roast peppers; bake potatoes; pickle cucumbers; "
        "slice a tomato; freeze peas; eat a pomegranate; make rose petal tea; make a bouquet of paper tulips; make a daisy chain; "
        "buy flowers for my mother; paint sunflowers; photograph a tree in fog; sketch a leaf; carve a spoon from wood; "
        "sand a wooden chair; rake the ashes out of a stove; shovel snow; sweep the terrace; light a barbecue; put up a hammock; "
        "clean garden chairs; oil a gate; pave a path; hang a bird feeder; identify a mushroom; track a fox; "
        "catch a frog for a biology lesson; keep chickens; milk a goat",
        "the word 'root' in mathematics; family trees; branches of a bank; plant managers in a factory; power plants; "
        "seed money for firms; the rose in heraldry; fruit salad; vegetable soup; tomato sauce; the history of the potato; "
        "flower paintings; Dutch still lifes; the smell of rain; beekeeping; butterflies; squirrels; hedgehogs; owls; coconut milk; "
        "cork; cotton shirts; rubber boots; hay fever; playgrounds; zoos; national parks; golf; cricket on the village green; picnics; "
        "barbecues; garden parties in novels; wicker chairs",
    ),
    "errands": _subject(
        "return a pair of shoes; choose a present for a teacher; wait in a long queue; find a lost key; "
        "carry a heavy box down the stairs; post a parcel to Spain; read a map of the underground; order coffee in Italian; "
        "complain about cold food; borrow a ladder; remember a shopping list; get up early; fall asleep faster; stop biting my nails; "
        "whistle with two fingers; juggle three balls; learn a card trick; solve a crossword; win at chess; play table tennis; "
        "throw a frisbee; ride a horse; row a boat; skate backwards; ski down a blue run; swim butterfly; catch a ball; bowl a strike; "
        "dance a waltz; sing a round; clap a rhythm; hum a tune",
        "umbrellas; queues; neighbours; lost property offices; weekends; Mondays; libraries; post offices; bakeries; ferries; trams; "
        "lighthouses in Brittany; chess openings; card games; riddles; nicknames; accents; slow breakfasts; long baths; afternoon naps",
    ),
    "home": _subject(
        "bleed a radiator; unblock a sink; hang wallpaper; fit a blind; tile a bathroom; lay a carpet; insulate a window; "
        "assemble a bookcase; sharpen scissors; iron a pleated skirt; fold a fitted sheet; wash a duvet; "
        "remove candle wax from a table; clean a chandelier; get a ring off a swollen finger; open a stubborn jar; defrost a freezer; "
        "pack china; label boxes; sort photographs; wind a clock; set a table for eight; polish shoes; brighten a dark hallway; "
        "choose a mattress; put up a picture rail; mend a zip; darn a sock",
        "door handles; doorbells; kettles; sofas; rugs; bunk beds; attics; cellars; chimneys; roof tiles; bathrooms; mirrors; candles; "
        "dishwashers; tea towels; wardrobes; pillows; paint colours",
    ),
    "table": _subject(
        "boil an egg; whip cream; melt chocolate; knead dough; grill fish; steam dumplings; fry onions; poach a pear; brew tea; "
        "froth milk; make mayonnaise; make a stock from bones; fillet a trout; cook lentils; toast nuts; season a pan; "
        "bake shortbread; fold a burrito; plan meals for a week; cook for one; pack a lunch box; carve a turkey; taste olive oil; "
        "choose a cheese board; decorate a cake",
        "noodles; rye bread; mustard; chocolate; pancakes; dumplings; sushi; curry; coffee; lemonade; picnic food; school lunches; "
        "leftovers; tea ceremonies; ice cream; porridge; pickles; sandwiches",
    ),
    "mind": _subject(
        "calculate a percentage; round a number; measure an angle; read a graph; convert miles to kilometres; estimate a crowd; "
        "read Roman numerals; find a square root; spell 'necessary'; use a semicolon; learn Spanish; pronounce Welsh names; "
        "write in italics; outline a novel; rhyme with 'orange'; tell a joke; give a toast; interview a baker; debate in class; "
        "review a film; draw a map; make a timeline; name a star; predict the weather; melt ice quickly; float an egg; make a compass; "
        "see a comet",
        "the Vikings; the pyramids; the Silk Road; the printing press; Marie Curie; Beethoven; the Olympic Games; the alphabet; zero; "
        "triangles; probability; atoms; electricity; gravity; earthquakes; icebergs; whales; penguins; ants; the moon; comets; clocks; "
        "maps; flags; coins; stamps; opera; ballet; cinema; comics; radio plays; fairy tales; proverbs; palindromes; sonnets",
    ),
    "office": _subject(
        "make a pivot table; reset a password; share a calendar; mute a group chat; scan a document; crop a picture; write an invoice; "
        "take minutes; chair a debate; share feedback; end a phone call; negotiate a deadline; train a successor; "
        "write a resignation letter; order stationery; book a meeting room; present a chart; plan a team outing; remember names; "
        "write an out-of-office note; fix a paper jam",
        "passwords; emojis; fonts; newsletters; video calls; headphones; web browsers; databases; Python lists; recursion; printers; "
        "batteries; commuting; job titles; internships; invoices; handshakes; dress codes; retirement",
    ),
}
