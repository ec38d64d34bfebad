"""Word lists, and makers of words that no list holds (so that the model learns to copy, not to recognise)."""

# Sentence forms and word lists are easier to read and to compare on one line.
# ruff: noqa: E501

import random

from .chat import is_held_out

NAMES = """Ana Ben Carla David Elena Felix Greta Hugo Ines Jonas Karin Leo Maria Nora Oscar Paula Quentin Rosa Simon Tara
Ursula Victor Wendy Xavier Yara Zoe Alice Bob Charlie Diana Emma Frank Grace Henry Irene Jack Kate Liam Mia Noah Olivia
Peter Rachel Sam Tom Uma Vera Will Yusuf Zara Amir Bella Chen Dmitri Erik Fatima Gina Hassan Ivan Julia Kofi Lena Marco
Nadia Omar Priya Raj Sofia Tomas Vikram Mei Hiro Sakura Ling Jamal Aisha Pablo Lucia Diego Chloe Louis Anton Bruno Clara
Dora Edgar Fiona Georg Hanna Isaac Jane Kevin Laura Martin Nina Otto Petra Robert Sara Theo Vincent John Mary James Linda
Michael Susan Daniel Lisa Paul Anna Mark Emily George Helen Lucas Eva Max Amy Adam Ella Alex Kim Lee Sven Astrid Bjorn
Freya Ingrid Lars Olga Boris Katya Mikhail Natasha Ahmed Layla Khalid Samira Tariq Noor Ravi Anita Deepak Kavya Arjun Lakshmi
Kenji Yuki Haruto Aiko Minho Jisoo Wei Jun Xiu Feng Thabo Zanele Amara Chidi Ngozi Kwame Carlos Isabel Javier Carmen Miguel
Teresa Luca Giulia Matteo Chiara Pierre Camille Antoine Juliette Jan Piotr Agnes Zofia Milos Jelena Stefan Mirela""".split()

# Letters that the tokenizer writes byte by byte: all bytes of a character have to follow each other.
ACCENTED = """José Zoë Łukasz François Jürgen Søren Ñusta Şebnem Çağla Ólafur Åsa Émile Noël Renée Žofia Dvořák Øyvind Þóra Ígor Märta Günther Kärt
Ángel Inés Iñaki Mãe João Gonçalo Böðvar Ștefan Răzvan Gražina Đorđe Ömer Ümit Chloé Maël Anaïs Göran Väinö Jiří Růžena Matěj Zdeněk""".split()

EMOJI = "😀 😂 👍 🎉 ❤️ 🚀 🔥 🤖 🐱 🐶 🍕 ☕ 🌍 ✅ 👋 🙏 😎 🥳".split()

CITIES = """Lima Paris Berlin Tokyo Rome Madrid Oslo Cairo Delhi Boston Chicago Dublin Vienna Prague Warsaw Athens Lisbon
Zurich Geneva Munich Hamburg London Leeds Milan Naples Turin Seville Porto Lyon Nice Ghent Bruges Helsinki Stockholm Bergen
Riga Vilnius Tallinn Sofia Bucharest Budapest Belgrade Zagreb Istanbul Ankara Beirut Amman Dubai Doha Mumbai Chennai Dhaka
Hanoi Manila Jakarta Seoul Busan Osaka Kyoto Beijing Shanghai Shenzhen Taipei Sydney Perth Auckland Toronto Montreal Denver
Seattle Austin Dallas Houston Miami Atlanta Phoenix Bogota Quito Santiago Havana Nairobi Lagos Accra Tunis Rabat Dakar
Kigali Harare Durban Reykjavik Bern Basel Cologne Dresden Leipzig Bristol Oxford Cambridge York Glasgow Cardiff""".split()

COLOURS = """red blue green yellow orange purple pink brown black white grey silver gold turquoise violet beige crimson
teal maroon indigo""".split()
FOODS = """pizza pasta sushi rice soup bread cheese chocolate salad curry noodles tacos pancakes apples mangoes bananas
cherries dumplings burgers potatoes tomatoes yoghurt honey waffles lasagna paella falafel hummus risotto ramen""".split()
ANIMALS = """dog cat horse rabbit parrot hamster turtle goldfish pony snake lizard ferret canary goat duck""".split()
HEROES = """fox cat dog robot dragon owl bear rabbit mouse wizard whale turtle sailor knight princess cloud tree star
penguin elephant lion frog bee snail pirate baker gardener train lighthouse moon wolf hedgehog squirrel duck goat horse
monkey giraffe crab octopus king queen astronaut farmer painter teacher ghost snowman kite boat parrot llama camel panda
spider ant butterfly dolphin crow seal""".split()
JOBS = """doctor teacher nurse pilot baker farmer painter engineer lawyer singer dancer writer cook plumber carpenter
gardener driver librarian actor chemist dentist architect sailor journalist photographer tailor programmer waiter
electrician mechanic""".split()
HOBBIES = """chess painting running swimming cycling reading gardening cooking singing dancing fishing sailing climbing
hiking knitting photography skiing surfing tennis football yoga pottery astronomy origami""".split()
THINGS = """box book key lamp chair table bottle cup bag bike car boat coat hat shoe ring watch clock phone camera drum
guitar violin piano ball kite rope tent stove spoon knife plate bowl basket pillow blanket mirror candle brush pen
pencil notebook map compass coin stamp ticket umbrella helmet ladder hammer saw nail screw bucket broom fan radio
sofa desk shelf carpet curtain vase kettle toaster scarf glove sock shirt jacket belt""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
LIST_WORDS = sorted(
    set(
        THINGS
        + ANIMALS
        + COLOURS
        + FOODS
        + """apple banana cherry orange peach mango kiwi berry bean corn potato tomato cucumber cabbage bread cake cookie cheese
mouse chicken cow pig sheep snail spider owl crow swan deer fox monkey elephant zebra camel penguin doctor nurse farmer teacher pilot
baker one two three four five red house car computer keyboard screen cable robot token cache page batch model server kernel tensor graph
sun moon rain snow wind fire river lake sea hill tree leaf grass rose lily
stone sand gold iron wood glass paper milk tea coffee water juice salt sugar butter egg lemon plum pear grape melon
carrot onion pepper garlic olive tiger lion bear wolf eagle hawk bee ant frog fish shark whale king queen child friend
school street bridge tower castle garden forest island desert valley winter summer spring autumn morning evening night
music dance song story poem train plane bus ship truck wheel engine window door roof wall floor kitchen""".split()
    )
)

ZH_NAMES = """小明 小红 小华 小丽 小刚 小芳 王伟 李娜 张敏 刘洋 陈静 杨帆 赵雷 黄磊 周杰 吴倩 徐强 孙悦 马超 朱琳 胡军 郭晶 何平
高翔 林涛 罗兰 郑爽 梁宇 谢婷 宋佳 唐亮 许晴 邓超 冯雪 韩梅 曹阳 彭飞 曾志 萧然 田甜 董洁 袁泉 潘安 于谦 蒋欣 蔡琴 余华 杜鹃 叶青 程龙""".split()
ZH_CITIES = """北京 上海 广州 深圳 杭州 南京 成都 重庆 武汉 西安 天津 苏州 长沙 青岛 大连 厦门 昆明 哈尔滨 沈阳 郑州 济南 合肥 福州 南宁
贵阳 海口 兰州 太原 拉萨 香港 台北 东京 巴黎 伦敦 纽约 柏林""".split()
ZH_COLOURS = "红色 蓝色 绿色 黄色 橙色 紫色 粉色 棕色 黑色 白色 灰色 金色 银色".split()
ZH_FOODS = "饺子 面条 米饭 火锅 烤鸭 包子 豆腐 汤圆 苹果 香蕉 西瓜 草莓 巧克力 披萨 寿司 蛋糕 馒头 炒饭".split()
ZH_PETS = "狗 猫 兔子 鹦鹉 乌龟 仓鼠 金鱼".split()
ZH_PET_NAMES = "旺财 咪咪 豆豆 球球 花花 毛毛 乐乐 多多 小白 小黑 大黄 点点 果果 糖糖 奇奇 团团 圆圆 皮皮".split()

_ONSETS = "b c d f g h j k l m n p r s t v w z br dr gr kr tr st sh ch th fl pl".split()
_VOWELS = "a e i o u a e i o ai ea oo".split()
_CODAS = ["", "", "", "n", "r", "l", "s", "m", "x", "k", "t", "nd", "ck"]


def made_up(rng: random.Random, syllables: int = 0) -> str:
    """A pronounceable lower-case word that most likely does not exist."""
    count = syllables or rng.choice((2, 2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(count)) + rng.choice(_CODAS)


def _draw(rng: random.Random, words: list[str], held_out: bool, made_up_share: float) -> str:
    while True:
        word = made_up(rng).capitalize() if rng.random() < made_up_share else rng.choice(words)
        if is_held_out("name", word, every=10) == held_out:
            return word


def person(rng: random.Random, held_out: bool) -> str:
    """A first name; held-out names never occur in training."""
    return _draw(rng, ACCENTED if rng.random() < 0.04 else NAMES, held_out, 0.35)


def city(rng: random.Random, held_out: bool) -> str:
    return _draw(rng, CITIES, held_out, 0.15)


def pet(rng: random.Random, held_out: bool) -> str:
    return _draw(rng, PET_NAMES, held_out, 0.4)


PET_NAMES = """Rex Bella Luna Max Coco Milo Rocky Daisy Buddy Lucky Molly Toby Simba Nala Oreo Ginger Shadow Pepper Biscuit
Ziggy Felix Mittens Bruno Ruby Waffles Pickles Snowy Bandit Cleo Hazel Sparky Muffin Tiger Smokey Peanut Domino""".split()


_ZH_FAMILY = "王李张刘陈杨赵黄周吴徐孙马朱胡郭何高林罗郑梁谢宋唐许邓冯韩曹彭曾萧田董袁潘于蒋蔡余杜叶程苏魏吕丁任沈姚卢"
_ZH_GIVEN = "伟娜敏洋静帆雷磊杰倩强悦超琳军晶平翔涛兰爽宇婷佳亮晴雪梅阳飞志甜洁泉安欣琴华青龙明红丽刚芳春秋月云文武海山天宁可心雨晨"


def zh_person(rng: random.Random, held_out: bool) -> str:
    while True:
        name = rng.choice(ZH_NAMES)
        if rng.random() < 0.7:
            name = rng.choice(_ZH_FAMILY) + "".join(rng.choice(_ZH_GIVEN) for _ in range(rng.choice((1, 1, 2))))
        if rng.random() < 0.15:
            name = rng.choice(_ZH_FAMILY) + "".join(rare_character(rng) for _ in range(rng.choice((1, 2))))
        if is_held_out("name", name, every=10) == held_out:
            return name


def rare_character(rng: random.Random) -> str:
    """One of the 3,755 common characters of GB 2312: most of them have no token of their own."""
    while True:
        try:
            return bytes((rng.randint(0xB0, 0xD7), rng.randint(0xA1, 0xFE))).decode("gb2312")
        except UnicodeDecodeError:
            continue


def number(rng: random.Random, low: int, high: int) -> int:
    """An integer whose number of digits, not its value, is about uniform."""
    top = rng.choice([10**k for k in range(len(str(low)), len(str(high)))] + [high])
    return rng.randint(low, min(top, high))
