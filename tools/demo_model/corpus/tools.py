"""Calling tools that the prompt describes: everyday ones, and made-up ones that only their description explains."""

# Sentence forms and word lists are easier to read and to compare on one line.
# ruff: noqa: E501

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import words
from .arithmetic import operands, solve
from .chat import Message, Tool, assistant, call, dumps, user

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One request that a tool serves: what the user says, the arguments, the tool's result, and the final sentence."""

    request: str
    arguments: Arguments
    result: str
    reply: str


@dataclass(frozen=True)
class Toolkit:
    """A tool with a maker of fitting requests. `topic` keeps two tools of the same kind out of one prompt."""

    topic: str
    tool: Tool
    task: Callable[[random.Random, bool], Task]


def define(
    name: str, description: str, parameters: dict[str, tuple[str, str]], required: list[str] | None = None
) -> Tool:
    """An OpenAI-style tool; `parameters` maps a name to its JSON type and description (empty for none)."""
    properties = {
        key: {"type": kind, "description": text} if text else {"type": kind} for key, (kind, text) in parameters.items()
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(parameters) if required is None else required,
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def _weather(rng: random.Random) -> Toolkit:
    key = rng.choice(("city", "city", "location", "place", "town"))
    name = rng.choice(
        (
            "get_weather",
            "get_weather",
            "weather",
            "get_current_weather",
            "lookup_weather",
            "weather_now",
            "fetch_weather",
        )
    )
    text = rng.choice(("Get the current weather of a city.", "Get the weather", "Current weather for a place.", "Tells the weather in a city.",
                       "Get the current weather in a given location"))  # fmt: skip
    tool = define(name, text, {key: ("string", rng.choice(("", "The name of the city", "City name", "The city")))})
    with_unit = rng.random() < 0.3
    if with_unit:
        tool["function"]["parameters"]["properties"]["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}

    def task(rng: random.Random, held_out: bool) -> Task:
        city = words.city(rng, held_out)
        degrees, sky = rng.randint(-10, 38), rng.choice(("sunny", "cloudy", "rainy", "windy", "snowy", "foggy"))
        request = rng.choice(("What is the weather in {c}?", "How is the weather in {c}?", "What's the weather like in {c}?", "Is it raining in {c}?",
                              "How warm is it in {c}?", "Weather in {c}?", "weather in {c} please", "Tell me the weather in {c}.",
                              "Do I need an umbrella in {c}?", "What is the weather like in {c} today?", "{c}的天气怎么样？"))  # fmt: skip
        form = rng.randrange(3)
        result = [
            dumps({"temperature": degrees, "sky": sky}),
            f"{sky}, {degrees} degrees",
            dumps({key: city, "temperature": degrees, "condition": sky}),
        ]
        reply = f"It is {sky} in {city}, with {degrees} degrees."
        if request.endswith("天气怎么样？"):
            names = {
                "sunny": "晴天",
                "cloudy": "多云",
                "rainy": "下雨",
                "windy": "有风",
                "snowy": "下雪",
                "foggy": "有雾",
            }
            reply = f"{city}现在{names[sky]}，{degrees}度。"
        arguments: Arguments = {key: city}
        if with_unit and rng.random() < 0.4 and "天气" not in request:
            arguments["unit"] = rng.choice(("celsius", "fahrenheit"))
            request = request.rstrip(".?") + f" in {arguments['unit']}" + ("?" if request.endswith("?") else ".")
        return Task(request.format(c=city), arguments, result[form], reply)

    return Toolkit("weather", tool, task)


def _calculator(rng: random.Random) -> Toolkit:
    key = rng.choice(("expression", "expr", "formula"))
    name = rng.choice(("calculator", "calculate", "compute", "evaluate", "math"))
    tool = define(
        name,
        rng.choice(("Evaluate an arithmetic expression.", "A calculator.", "Computes a formula.", "Calculate a sum.")),
        {key: ("string", "")},
    )

    def task(rng: random.Random, held_out: bool) -> Task:
        a, op, b = operands(rng, held_out)
        kind = rng.random()
        if kind < 0.4:
            op, value = "*", a * b
            request = rng.choice(
                ("What is {a} times {b}?", "What is {a} * {b}?", "Multiply {a} by {b}.", "How much is {a} x {b}?")
            )
        else:
            value = solve(a, op, b)
            request = rng.choice(
                (
                    "What is {a} {o} {b}?",
                    "Calculate {a} {o} {b}.",
                    "How much is {a} {o} {b}?",
                    "{a} {o} {b} = ?",
                    "Compute {a} {o} {b}",
                )
            )
        return Task(
            request.format(a=a, b=b, o=op),
            {key: f"{a} {op} {b}"},
            rng.choice((str(value), dumps({"result": value}))),
            f"{a} {op} {b} = {value}.",
        )

    return Toolkit("sum", tool, task)


def _search(rng: random.Random) -> Toolkit:
    key = rng.choice(("query", "query", "q", "text", "keywords"))
    name = rng.choice(("search", "web_search", "search_web", "find_pages", "google", "lookup"))
    tool = define(
        name,
        rng.choice(("Search the web.", "Find pages on the internet.", "Searches the internet for a text.")),
        {key: ("string", rng.choice(("", "What to search for")))},
    )

    def task(rng: random.Random, held_out: bool) -> Task:
        query = " ".join(
            rng.sample(words.LIST_WORDS, rng.randint(1, 3))
            if rng.random() < 0.7
            else [words.made_up(rng), rng.choice(words.LIST_WORDS)]
        )
        request = rng.choice(
            (
                "Search for {q}.",
                "Search the web for {q}.",
                "Look up {q} on the internet.",
                "Find pages about {q}.",
                "Can you search for {q}?",
                "search {q}",
            )
        )
        count = rng.randint(2, 99)
        title = " ".join(word.capitalize() for word in rng.sample(words.LIST_WORDS, 2))
        return Task(
            request.format(q=query),
            {key: query},
            dumps({"count": count, "first": title}),
            f"I found {count} pages; the first is {title}.",
        )

    return Toolkit("search", tool, task)


def _timer(rng: random.Random) -> Toolkit:
    key = rng.choice(("minutes", "duration", "minutes"))
    name = rng.choice(("set_timer", "start_timer", "timer", "set_alarm_timer"))
    tool = define(
        name,
        rng.choice(("Set a timer.", "Start a timer for some minutes.", "Starts a countdown.")),
        {key: ("integer", rng.choice(("", "Length in minutes")))},
    )

    def task(rng: random.Random, held_out: bool) -> Task:
        minutes = rng.randint(2, 120)
        request = rng.choice(
            (
                "Set a timer for {m} minutes.",
                "Start a timer of {m} minutes.",
                "Please set a {m} minute timer.",
                "Wake me in {m} minutes.",
                "timer {m} minutes",
            )
        )
        return Task(
            request.format(m=minutes),
            {key: minutes},
            rng.choice(("ok", dumps({"status": "started"}))),
            f"The timer is set for {minutes} minutes.",
        )

    return Toolkit("timer", tool, task)


def _translate(rng: random.Random) -> Toolkit:
    text_key, language_key = rng.choice((("text", "language"), ("text", "target_language"), ("phrase", "to")))
    name = rng.choice(("translate", "translate_text", "translator"))
    tool = define(
        name,
        rng.choice(("Translate a text.", "Translates text into another language.")),
        {text_key: ("string", ""), language_key: ("string", rng.choice(("", "Target language")))},
    )

    def task(rng: random.Random, held_out: bool) -> Task:
        text = " ".join(rng.sample(words.LIST_WORDS, rng.randint(1, 3)))
        language = rng.choice("French German Spanish Italian Chinese Japanese Polish Greek Turkish Dutch".split())
        request = rng.choice(
            (
                'Translate "{t}" into {l}.',
                "Translate {t} into {l}.",
                "How do you say {t} in {l}?",
                "What is {t} in {l}?",
            )
        )
        result = " ".join(words.made_up(rng) for _ in range(rng.randint(1, 3)))
        reply = f'In {language} that is "{result}".'
        return Task(
            request.format(t=text, l=language),
            {text_key: text, language_key: language},
            rng.choice((result, dumps({"translation": result}))),
            reply,
        )

    return Toolkit("translate", tool, task)


def _stock(rng: random.Random) -> Toolkit:
    key = rng.choice(("symbol", "ticker", "company"))
    name = rng.choice(("get_stock_price", "stock_price", "stock_quote", "get_share_price"))
    tool = define(
        name,
        rng.choice(("Get the price of a share.", "Current stock price of a company.", "Get a stock quote.")),
        {key: ("string", "")},
    )

    def task(rng: random.Random, held_out: bool) -> Task:
        company = (
            words.made_up(rng).capitalize()
            if key == "company"
            else "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, 4)))
        )
        price = words.number(rng, 1, 999)
        request = rng.choice(
            (
                "What is the stock price of {c}?",
                "How much is a share of {c}?",
                "Get the price of {c} shares.",
                "What does {c} stock cost?",
                "stock price of {c}",
            )
        )
        return Task(
            request.format(c=company),
            {key: company},
            dumps({"price": price}),
            f"A share of {company} costs {price} dollars.",
        )

    return Toolkit("stock", tool, task)


def _calendar(rng: random.Random) -> Toolkit:
    name = rng.choice(("add_event", "create_event", "calendar_add", "schedule_meeting", "add_to_calendar"))
    title_key, day_key = rng.choice((("title", "day"), ("event", "day"), ("name", "date")))
    with_time = rng.random() < 0.5
    parameters = {title_key: ("string", ""), day_key: ("string", "")} | (
        {"time": ("string", rng.choice(("", "For example 14:30")))} if with_time else {}
    )
    tool = define(
        name,
        rng.choice(
            ("Add an event to the calendar.", "Create a calendar entry.", "Schedule a meeting in the calendar.")
        ),
        parameters,
    )

    def task(rng: random.Random, held_out: bool) -> Task:
        title = rng.choice(
            "lunch dinner meeting dentist party concert training interview walk call football chess".split()
        )
        day, time = rng.choice(words.DAYS), f"{rng.randint(7, 21)}:{rng.choice(('00', '15', '30'))}"
        when = f"{day} at {time}" if with_time else day
        request = rng.choice(
            (
                "Add {t} on {w} to my calendar.",
                "Put {t} into my calendar for {w}.",
                "Schedule {t} on {w}.",
                "Create an event called {t} on {w}.",
            )
        )
        arguments = {title_key: title, day_key: day} | ({"time": time} if with_time else {})
        return Task(
            request.format(t=title, w=when),
            arguments,
            rng.choice(("ok", dumps({"status": "added"}))),
            f"I have added {title} on {when} to your calendar.",
        )

    return Toolkit("calendar", tool, task)


def _mail(rng: random.Random) -> Toolkit:
    name = rng.choice(("send_message", "send_mail", "send_email", "message"))
    who, what = rng.choice((("to", "text"), ("recipient", "message"), ("to", "body")))
    tool = define(
        name,
        rng.choice(("Send a message to a person.", "Send an email.", "Sends a text to somebody.")),
        {who: ("string", ""), what: ("string", "")},
    )

    def task(rng: random.Random, held_out: bool) -> Task:
        person = words.person(rng, held_out)
        text = rng.choice(
            "I am late|see you soon|happy birthday|dinner is ready|call me back|the train is late|good luck|where are you|thank you|the meeting is over".split(
                "|"
            )
        )
        request = rng.choice(
            (
                "Send {p} a message: {t}",
                "Tell {p}: {t}",
                'Write to {p}: "{t}"',
                "Message {p}: {t}",
                "Send an email to {p}: {t}",
            )
        )
        return Task(
            request.format(p=person, t=text),
            {who: person, what: text},
            rng.choice(("sent", dumps({"status": "sent"}))),
            f"I have sent the message to {person}.",
        )

    return Toolkit("mail", tool, task)


def _time(rng: random.Random) -> Toolkit:
    takes_city = rng.random() < 0.7
    name = rng.choice(("get_time", "current_time", "clock", "time_now", "get_current_time"))
    key = rng.choice(("city", "timezone", "place"))
    tool = define(
        name,
        "Get the current time in a city." if takes_city else rng.choice(("Get the current time.", "Tells the time.")),
        {key: ("string", "")} if takes_city else {},
    )

    def task(rng: random.Random, held_out: bool) -> Task:
        city, time = words.city(rng, held_out), f"{rng.randint(0, 23)}:{rng.randint(10, 59)}"
        if takes_city:
            request = rng.choice(
                (
                    "What time is it in {c}?",
                    "What is the time in {c}?",
                    "Tell me the time in {c}.",
                    "How late is it in {c}?",
                )
            ).format(c=city)
            return Task(request, {key: city}, rng.choice((time, dumps({"time": time}))), f"It is {time} in {city}.")
        request = rng.choice(("What time is it?", "What is the time?", "Tell me the time.", "How late is it?"))
        return Task(request, {}, rng.choice((time, dumps({"time": time}))), f"It is {time}.")

    return Toolkit("time", tool, task)


def _light(rng: random.Random) -> Toolkit:
    name = rng.choice(("set_light", "switch_light", "control_light", "light"))
    key = rng.choice(("on", "state", "on"))
    tool = define(
        name,
        rng.choice(("Switch a light on or off.", "Control the lights of a room.")),
        {"room": ("string", ""), key: ("boolean" if key == "on" else "string", "" if key == "on" else "on or off")},
    )

    def task(rng: random.Random, held_out: bool) -> Task:
        room, on = rng.choice("kitchen bedroom garage office hall bathroom cellar garden".split()), rng.random() < 0.5
        word = "on" if on else "off"
        request = rng.choice(
            (
                "Switch {w} the light in the {r}.",
                "Turn {w} the {r} light.",
                "Turn the light in the {r} {w}.",
                "Light {w} in the {r}, please.",
            )
        )
        return Task(
            request.format(w=word, r=room),
            {"room": room, key: on if key == "on" else word},
            "ok",
            f"The light in the {room} is {word}.",
        )

    return Toolkit("light", tool, task)


_ASPECTS = """price status weight height colour size owner address length age speed rating schedule menu score balance distance
temperature location title author duration capacity level phone email""".split()
_ENTITIES = """parcel order book song movie train flight bus planet river mountain recipe customer account invoice ticket hotel
restaurant museum shop product machine server sensor robot game player team school room ship bridge animal plant medal coin""".split()


def _lookup(rng: random.Random) -> Toolkit:
    """A made-up tool, such as `find_river_length(river)`."""
    aspect, thing = rng.choice(_ASPECTS), rng.choice(_ENTITIES)
    verb = rng.choice("get find fetch lookup check show read query".split())
    name = rng.choice(
        (
            f"{verb}_{thing}_{aspect}",
            f"{verb}_{aspect}",
            f"{thing}_{aspect}",
            f"{words.made_up(rng)}_{thing}",
            f"{verb}{thing.capitalize()}{aspect.capitalize()}",
        )
    )
    key = rng.choice((thing, f"{thing}_name", "name", f"{thing}_id", "id", words.made_up(rng)))
    numeric = key.endswith("id") and rng.random() < 0.5
    text = rng.choice(
        (
            "Get the {a} of a {t}.",
            "Look up the {a} of a {t}.",
            "Returns the {a} of a {t}.",
            "Find out the {a} of one {t}.",
            "{a} of a {t}",
        )
    ).format(a=aspect, t=thing)
    tool = define(
        name,
        text[0].upper() + text[1:],
        {key: ("integer" if numeric else "string", "" if key in (thing, "name") else f"The {thing}")},
    )

    def task(rng: random.Random, held_out: bool) -> Task:
        value: Any = (
            rng.randint(1, 9999)
            if numeric
            else rng.choice(
                (
                    words.made_up(rng).capitalize(),
                    words.person(rng, held_out),
                    f"{rng.choice('ABCDEFGHKLMN')}{rng.randint(1, 999)}",
                )
            )
        )
        found: Any = words.number(rng, 1, 999) if rng.random() < 0.6 else rng.choice(words.COLOURS + words.DAYS)
        request = rng.choice(
            (
                "What is the {a} of the {t} {v}?",
                "Get the {a} of {t} {v}.",
                "Tell me the {a} of {t} {v}.",
                "I need the {a} of the {t} {v}.",
                "Which {a} does the {t} {v} have?",
                "{a} of {t} {v}?",
            )
        )
        request = request.format(a=aspect, t=thing, v=value)
        result = rng.choice((str(found), dumps({aspect: found}), dumps({thing: value, aspect: found})))
        return Task(
            request[0].upper() + request[1:], {key: value}, result, f"The {aspect} of the {thing} {value} is {found}."
        )

    return Toolkit(f"{aspect}/{thing}", tool, task)


def _action(rng: random.Random) -> Toolkit:
    """A made-up action with one to three parameters that the request names."""
    verb = rng.choice(
        "book order open close start stop delete create rename move paint repair print play buy sell rent".split()
    )
    thing = rng.choice(_ENTITIES + ["table", "taxi", "file", "door", "window", "playlist", "report"])
    options = {"colour": ("string", words.COLOURS), "count": ("integer", None), "day": ("string", words.DAYS), "priority": ("integer", None), "size": ("integer", None),
               "city": ("string", words.CITIES), "owner": ("string", words.NAMES)}  # fmt: skip
    keys = rng.sample(list(options), rng.randint(0, 2))
    tool = define(
        f"{verb}_{thing}" if rng.random() < 0.7 else f"{words.made_up(rng)}_{verb}",
        f"{verb.capitalize()} a {thing}.",
        {"name": ("string", ""), **{key: (options[key][0], "") for key in keys}},
    )

    def task(rng: random.Random, held_out: bool) -> Task:
        name = words.made_up(rng).capitalize() if rng.random() < 0.5 else words.person(rng, held_out)
        arguments: Arguments = {"name": name}
        for key in keys:
            choices = options[key][1]
            arguments[key] = rng.choice(choices) if choices else rng.randint(1, 99)
        extra = " and ".join(f"{key} {arguments[key]}" for key in keys)
        request = rng.choice(
            ("{v} the {t} {n}{x}.", "Please {v} the {t} {n}{x}.", "Can you {v} the {t} {n}{x}?")
        ).format(v=verb, t=thing, n=name, x=f" with {extra}" if extra else "")
        return Task(
            request[0].upper() + request[1:],
            arguments,
            rng.choice(("ok", "done", dumps({"status": "ok"}))),
            f"Done: {verb} {thing} {name}.",
        )

    return Toolkit(f"{verb}/{thing}", tool, task)


KITS = [
    (_weather, 4),
    (_calculator, 2),
    (_search, 2),
    (_timer, 1),
    (_translate, 1),
    (_stock, 1),
    (_calendar, 1),
    (_mail, 1),
    (_time, 1),
    (_light, 1),
    (_lookup, 7),
    (_action, 4),
]
NO_TOOL = "I have no tool for that."


def draw_kits(rng: random.Random, count: int) -> list[Toolkit]:
    """`count` tools of different topics and names."""
    chosen: list[Toolkit] = []
    makers, weights = zip(*KITS, strict=True)
    while len(chosen) < count:
        kit = rng.choices(makers, weights)[0](rng)
        taken = {other.topic for other in chosen} | {other.tool["function"]["name"] for other in chosen}
        taken |= {part for other in chosen for part in other.topic.split("/")}
        if not {kit.topic, kit.tool["function"]["name"], *kit.topic.split("/")} & taken:
            chosen.append(kit)
    return chosen


def call_turns(rng: random.Random, kit: Toolkit, held_out: bool, finish: bool) -> list[Message]:
    """A request and its call; with `finish`, also the tool's result and the final sentence."""
    task = kit.task(rng, held_out)
    name = kit.tool["function"]["name"]
    messages = [user(task.request), {"role": "assistant", "content": "", "tool_calls": [call(name, task.arguments)]}]
    if finish:
        messages += [{"role": "tool", "content": task.result}, assistant(task.reply)]
    return messages


def parallel_turns(rng: random.Random, kit: Toolkit, held_out: bool) -> list[Message]:
    """Two requests in one message give two calls."""
    first, second = kit.task(rng, held_out), kit.task(rng, held_out)
    name = kit.tool["function"]["name"]
    calls = [call(name, first.arguments), call(name, second.arguments)]
    return [
        user(f"{first.request} {second.request}"),
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": first.result},
        {"role": "tool", "content": second.result},
        assistant(f"{first.reply} {second.reply}"),
    ]


def no_fit_turns(rng: random.Random, kits: list[Toolkit], held_out: bool) -> list[Message]:
    """A request for a tool that is not there."""
    taken = {part for kit in kits for part in kit.topic.split("/")}
    while True:
        other = draw_kits(rng, 1)[0]
        if other.topic not in ("sum", "time") and not taken & set(other.topic.split("/")):
            return [user(other.task(rng, held_out).request), assistant(NO_TOOL)]
