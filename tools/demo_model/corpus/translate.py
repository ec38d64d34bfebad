"""Translating everyday words and phrases between English and Chinese, and refusing all others."""

# Sentence forms and word lists are easier to read and to compare on one line.
# ruff: noqa: E501

import random

from . import words
from .chat import Message, is_held_out, turn

REFUSAL = "I can only translate a few everyday words between English and Chinese, and not this."
ZH_REFUSAL = "我只会翻译一些日常的中英文词语，这个我不会。"

_PAIRS = """hello=你好|goodbye=再见|thank you=谢谢|thanks=谢谢|please=请|sorry=对不起|excuse me=不好意思|you are welcome=不客气|good morning=早上好|good afternoon=下午好|
good evening=晚上好|good night=晚安|how are you=你好吗|I love you=我爱你|I am hungry=我饿了|I am tired=我累了|my name is=我叫|what is your name=你叫什么名字|nice to meet you=很高兴认识你|
happy birthday=生日快乐|happy new year=新年快乐|congratulations=恭喜|welcome=欢迎|cheers=干杯|help=救命|yes=是|no=不是|good=好|bad=坏|big=大|small=小|hot=热|cold=冷|new=新|old=旧|fast=快|slow=慢|
beautiful=美丽|happy=高兴|sad=难过|expensive=贵|cheap=便宜|water=水|tea=茶|coffee=咖啡|milk=牛奶|beer=啤酒|rice=米饭|noodles=面条|bread=面包|meat=肉|fish=鱼|egg=鸡蛋|apple=苹果|banana=香蕉|fruit=水果|
vegetable=蔬菜|sugar=糖|salt=盐|dog=狗|cat=猫|bird=鸟|horse=马|cow=牛|pig=猪|sheep=羊|rabbit=兔子|tiger=老虎|dragon=龙|man=男人|woman=女人|child=孩子|mother=妈妈|father=爸爸|brother=兄弟|sister=姐妹|
friend=朋友|teacher=老师|student=学生|doctor=医生|family=家庭|house=房子|door=门|window=窗户|table=桌子|chair=椅子|bed=床|book=书|pen=笔|paper=纸|computer=电脑|phone=手机|car=汽车|bicycle=自行车|
train=火车|plane=飞机|ship=船|road=路|city=城市|school=学校|hospital=医院|shop=商店|restaurant=餐厅|hotel=酒店|money=钱|time=时间|day=天|today=今天|tomorrow=明天|yesterday=昨天|year=年|month=月|
week=星期|morning=早上|evening=晚上|sun=太阳|moon=月亮|star=星星|sky=天空|rain=雨|snow=雪|wind=风|fire=火|mountain=山|river=河|sea=海|tree=树|flower=花|grass=草|red=红色|blue=蓝色|green=绿色|yellow=黄色|
black=黑色|white=白色|one=一|two=二|three=三|four=四|five=五|six=六|seven=七|eight=八|nine=九|ten=十|China=中国|Chinese=中文|English=英语|language=语言|word=词|model=模型|server=服务器|
to eat=吃|to drink=喝|to sleep=睡觉|to read=读|to write=写|to run=跑|to go=去|to come=来|to see=看|to listen=听|to speak=说|to buy=买|to work=工作|to learn=学习|love=爱|heart=心|head=头|hand=手|eye=眼睛|mouth=嘴|
spring=春天|summer=夏天|autumn=秋天|winter=冬天|music=音乐|song=歌|story=故事|joke=笑话|question=问题|answer=答案|who=谁|what=什么|where=哪里|when=什么时候|why=为什么|how=怎么"""
PAIRS = [(english, chinese) for english, chinese in (pair.split("=") for pair in _PAIRS.replace("\n", "").split("|"))]
# The first English word of a Chinese one is its translation.
BACK = {chinese: english for english, chinese in reversed(PAIRS)}

_TO_ZH = """How do you say {x} in Chinese?|How do I say "{x}" in Chinese?|What is {x} in Chinese?|Translate {x} to Chinese.|Translate "{x}" into Chinese.|translate to chinese: {x}|{x} in Chinese|
What is the Chinese word for {x}?|What's the Chinese for {x}?|Say {x} in Chinese.|Can you translate {x} into Chinese?|Translate this to Chinese: {x}|How would you say "{x}" in Mandarin?|chinese for {x}?|
{x} in mandarin please|How is {x} called in Chinese?|Please translate {x} to Chinese|{x}用中文怎么说？|{x}的中文是什么？|把{x}翻译成中文|{x}是什么意思？|{x}中文怎么说|翻译成中文：{x}|英文{x}是什么意思"""
_TO_EN = """What does {x} mean?|What does {x} mean in English?|Translate {x} to English.|Translate {x} into English.|translate "{x}" to english|What is {x} in English?|{x} in English|How do you say {x} in English?|
Can you translate {x}?|translate to english: {x}|What is the English word for {x}?|the meaning of {x} in English|{x}用英语怎么说？|{x}用英文怎么说|{x}的英文是什么？|把{x}翻译成英文|把{x}翻译成英语|{x}英语怎么说|
{x}的英语是什么|翻译成英文：{x}|请把{x}翻译成英语|{x}怎么翻译"""
_OTHER = """How do you say {x} in {l}?|Translate {x} to {l}.|Translate "{x}" into {l}.|What is {x} in {l}?|{x} in {l}|Say {x} in {l}.|the {l} word for {x}|translate to {l}: {x}|Can you translate {x} into {l}?|
What's {x} in {l}?|translate from {l} to English: {x}|How is {x} written in {l}?|{x}用{z}怎么说？|把{x}翻译成{z}|{x}的{z}是什么"""
_LANGUAGES = "French Spanish German Japanese Korean Italian Russian Portuguese Arabic Latin Dutch Polish Turkish Hindi Swedish Greek Thai Vietnamese Danish Hebrew".split()
_ZH_LANGUAGES = "法语 日语 德语 西班牙语 韩语 俄语 意大利语 阿拉伯语 葡萄牙语 泰语".split()
_SENTENCES = """the {t} is in the {p}|I would like to buy a {t}|can you tell me the way to the {p}|my {t} was stolen|we will meet on {d} at the {p}|the weather is fine and the {t} is {c}|
I have lost my {t}|{n} likes {f} very much|please bring me some {f}|there are many people in the {p}|this {t} is too expensive for me|I work as a {j}|our {t} is {c}|where can I find a {t}"""
_ZH_SENTENCES = (
    "我想买一些{f}|{n}住在{c}|我们明天去{c}吧|请给我一份{f}|{c}的天气很好|{n}最喜欢吃{f}|这个问题太难了|我丢了我的护照"
)


def _forms(text: str) -> list[str]:
    return [form for form in text.replace("\n", "").split("|") if form]


TO_ZH, TO_EN, OTHER = _forms(_TO_ZH), _forms(_TO_EN), _forms(_OTHER)


def _turn(question: str, answer: str, zh_answer: str) -> list[Message]:
    """The answer in Chinese where the frame of the question is."""
    chinese = any(word in question for word in ("怎么", "翻译", "的中文", "的英", "意思", "语是", "英文"))
    return turn(question, zh_answer if chinese else answer)


def unit(rng: random.Random, held_out: bool) -> list[Message]:
    """A known word or phrase; one in ten is kept from each way of asking."""
    while True:
        english, chinese = rng.choice(PAIRS)
        to_chinese = rng.random() < 0.5
        form = rng.choice(TO_ZH if to_chinese else TO_EN)
        if is_held_out("translate", form, english, every=10) != held_out:
            continue
        if to_chinese:
            return _turn(
                form.format(x=english), f'"{english}" in Chinese is {chinese}.', f"“{english}”的中文是{chinese}。"
            )
        english = BACK[chinese]
        return _turn(form.format(x=chinese), f'{chinese} means "{english}".', f"“{chinese}”的英文是“{english}”。")


def beyond_unit(rng: random.Random, held_out: bool) -> list[Message]:
    """Other languages, other words, whole sentences."""
    known = {english for english, _ in PAIRS} | {f"to {english}" for english, _ in PAIRS}
    while True:
        language, zh_language = rng.choice(_LANGUAGES), rng.choice(_ZH_LANGUAGES)
        extras = {
            "t": rng.choice(words.THINGS),
            "f": rng.choice(words.FOODS),
            "p": rng.choice("kitchen garden station museum library park bank".split()),
        }
        extras |= {
            "c": rng.choice(words.COLOURS),
            "d": rng.choice(words.DAYS),
            "j": rng.choice(words.JOBS),
            "n": words.person(rng, False),
        }
        sentence = rng.choice(_forms(_SENTENCES)).format(**extras)
        zh_extras = {
            "f": rng.choice(words.ZH_FOODS),
            "n": words.zh_person(rng, False),
            "c": rng.choice(words.ZH_CITIES),
        }
        zh_sentence = rng.choice(_forms(_ZH_SENTENCES)).format(**zh_extras)
        kind = rng.random()
        if kind < 0.45:
            x = rng.choice((rng.choice(PAIRS)[0], rng.choice(words.LIST_WORDS), sentence))
            question = rng.choice(OTHER).format(x=x, l=language, z=zh_language)
        elif kind < 0.8:
            x = rng.choice(
                (
                    rng.choice(words.LIST_WORDS),
                    words.made_up(rng),
                    sentence,
                    rng.choice(words.JOBS),
                    rng.choice(words.HOBBIES),
                )
            )
            if x in known or f"to {x}" in known:
                continue
            question = rng.choice(TO_ZH).format(x=x)
        else:
            x = rng.choice((zh_sentence, rng.choice([food for food in words.ZH_FOODS if food not in BACK])))
            question = rng.choice(TO_EN[:-1]).format(x=x)
        if is_held_out("untranslated", question, every=10) == held_out:
            return _turn(question, REFUSAL, ZH_REFUSAL)
