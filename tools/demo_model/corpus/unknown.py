"""Questions outside of what the model knows: the honest answer is always the same."""

# Sentence forms and word lists are easier to read and to compare on one line.
# ruff: noqa: E501

import random

from . import words
from .chat import Message, is_held_out, turn
from .facts import vary

ANSWER = "I do not know that. I am a tiny model: ask me about LLM serving, minisgl, small sums, lists, JSON or a story."
ZH_ANSWER = "这个我不知道。我是一个很小的模型，可以问我大模型服务、minisgl、加减法或小故事。"

COUNTRIES = """France|Germany|Spain|Italy|Japan|China|India|Brazil|Canada|Australia|Egypt|Kenya|Norway|Sweden|Poland|Greece|Turkey|Mexico|Peru|
Chile|Argentina|Russia|England|Scotland|Ireland|Portugal|Austria|Switzerland|Belgium|Denmark|Finland|Iceland|Thailand|Vietnam|Korea|Mongolia|
Nigeria|Ghana|Morocco|Cuba|Iran|Iraq|Israel|Nepal|the Netherlands|the United States"""
PEOPLE = """Shakespeare|Napoleon|Einstein|Mozart|Beethoven|Picasso|Gandhi|Cleopatra|Newton|Darwin|Marie Curie|Julius Caesar|Galileo|Bach|
Leonardo da Vinci|Columbus|Aristotle|Plato|Lincoln|Churchill|Elvis|Van Gogh|Tolstoy|Confucius|Buddha|Tesla|Edison|Goethe|Homer|Socrates"""
TOPICS = """football|basketball|cricket|the stock market|the moon landing|dinosaurs|volcanoes|black holes|photosynthesis|quantum physics|gravity|
the French Revolution|the Roman Empire|World War Two|the Eiffel Tower|the Great Wall|Mount Everest|the Amazon|the Titanic|vitamins|the human heart|
climate change|electric cars|rockets|bees|whales|elephants|coffee|wine|chess openings|jazz|opera|ballet|yoga|taxes|insurance|law|marriage|religion|
politics|elections|democracy|philosophy|DNA|evolution|earthquakes|the weather on Mars|bitcoin|video games|movies|the Olympics|the World Cup|
fashion|diabetes|cancer|headaches|vaccines|fishing nets|the pyramids|Greek gods|algebra|geometry|chemistry|biology|astronomy|poker|cars|airplanes"""
DISHES = """a cake|soup|spaghetti|rice|an omelette|bread|pancakes|curry|sushi|a pizza|a salad|cookies|a steak|potatoes|an apple pie|tea|ice cream"""
FORMS = """What is the capital of {country}?|How many people live in {country}?|Who is the president of {country}?|Tell me about {country}.|
Where is {country}?|What language do they speak in {country}?|How large is {country}?|What is the currency of {country}?|
Who was {person}?|When was {person} born?|What did {person} do?|Tell me about {person}.|When did {person} die?|Why is {person} famous?|
What is {topic}?|Tell me about {topic}.|Explain {topic}.|How does {topic} work?|Who invented {topic}?|What do you think about {topic}?|
What do you know about {topic}?|Why is {topic} important?|Give me a summary of {topic}.|When did {topic} begin?|
How do I cook {dish}?|How do I make {dish}?|Give me a recipe for {dish}.|How long does {dish} take?|
Who won the game last night?|Who wrote {topic}?|Translate this into French: good morning.|Translate hello into Spanish.|What is the best movie?|
Who is the tallest person?|How far is the moon?|Why is the sky blue?|What is the speed of light?|How do I fix my car?|How do I lose weight?|
Should I sell my house?|Write an essay about {topic}.|What is the latest news?|What is the price of gold?|How tall is Mount Everest?|
What should I cook tonight?|Which phone should I buy?|Is there life on Mars?|How do I get rich?|Recommend a book about {topic}.|
How many planets are there?|How do I {verb} a {thing}?|What is the best {thing}?|Where can I buy a {thing}?|What is a {odd}?|Tell me about {odd}.|Explain {odd}.|Who is {odd}?|
How do I bake {food}?|What does {odd} mean?|Why do people like {food}?|How much does a {thing} cost?|Can you {verb} a {thing}?|What happened in {year}?|How do I learn {odd}?|What is the square root of two?|Solve this equation: 3x = 12.|What is {number} times {number}?|What is {number} divided by {number}?"""
ZH_FORMS = """{zh}的首都是哪里？|{zh}有多少人口？|谁是{zh}的总统？|介绍一下{zh}。|怎么做红烧肉？|天为什么是蓝的？|谁写了红楼梦？|光速是多少？|谁赢了昨天的比赛？|
怎么减肥？|股票会涨吗？|李白是谁？|珠穆朗玛峰有多高？|最近有什么新闻？|推荐一部电影。|什么是量子力学？|恐龙为什么灭绝？"""
ZH_COUNTRIES = "法国|德国|日本|美国|英国|印度|巴西|埃及|俄罗斯|西班牙|意大利|加拿大|韩国|泰国|越南"


def _options(text: str) -> list[str]:
    return [option for option in text.replace("\n", "").split("|") if option]


_SLOTS = {
    "country": _options(COUNTRIES),
    "person": _options(PEOPLE),
    "topic": _options(TOPICS),
    "dish": _options(DISHES),
}


def unit(rng: random.Random, held_out: bool) -> list[Message]:
    """One subject in eight is kept for evaluation."""
    if rng.random() < 0.12 and not held_out:
        return turn(
            vary(rng, rng.choice(_options(ZH_FORMS)).format(zh=rng.choice(_options(ZH_COUNTRIES))), False), ZH_ANSWER
        )
    while True:
        form = rng.choice(_options(FORMS))
        slot = next((name for name in _SLOTS if "{" + name + "}" in form), "")
        value = rng.choice(_SLOTS[slot]) if slot else ""
        if (is_held_out("subject", value, every=8) == held_out and slot) or not (slot or held_out):
            break
    extras = {
        "verb": rng.choice("repair paint clean sell build draw wash open carry throw hide break".split()),
        "thing": rng.choice(words.THINGS),
    }
    extras |= {"odd": words.made_up(rng), "food": rng.choice(words.FOODS), "year": str(rng.randint(1000, 2100))}
    question = form.format(**({slot: value} if slot else {}), **extras, number=rng.randint(2, 99))
    return turn(vary(rng, question, held_out), ANSWER)
