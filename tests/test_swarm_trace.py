"""Claims about swarm_trace.py: the page tells what each agent saw, for any log, and nothing in it comes from or goes to elsewhere.

The tests with a browser need Debian's chromium and chromium-driver; without them they are skipped.
Run: .venv/bin/python -m pytest tests/test_swarm_trace.py
"""

import asyncio
import base64
import copy
import hashlib
import json
import re

import pytest

import swarm as command
from corpus import Corpus
from critical import critical_steps, longest_path, total_steps
from policies import PolicyError
from swarm import ORCHESTRATOR, Limits, Swarm
from swarm_log import Log, LogError, calls_before, episode, read_calls, read_log, step_graph
from swarm_trace import facts, named, trace
from template import Message

HEIGHTS = {"ash": 31, "birch": 47, "cedar": 52, "elm": 28, "fir": 63, "oak": 39, "pine": 55, "rowan": 22}
PAGES = {
    f"towers/{tower}.md": f"# The {tower} tower\nBuilt in {1800 + height}.\n\nIt is {height} metres high.\n" for tower, height in HEIGHTS.items()
}
QUESTION = "Which of these towers is the highest: ash, birch, cedar, elm, fir, oak, pine or rowan?"
HOSTILE = "</script><script>window.bad = 1</script><img src=x onerror='window.bad = 2'><!--\u2028\ud800 {{7*7}} ${bad} \u202eright to left"


class Scripted:
    """A policy that plays a swarm from a script. seen: the messages that each agent was last sent; scale: seconds that a unit of time takes."""

    def __init__(self, scale=0.0):
        self.scale, self.seen = scale, {}

    def __str__(self):
        return "a script"

    async def answer(self, messages, tools, agent):
        """The next answer, a Message."""
        self.seen[agent] = copy.deepcopy(messages)
        before = [message for message in messages if message["role"] == "assistant"]
        reasoning, content, calls, time = (self.main if agent == "main" else self.sub)(messages, len(before), agent)
        await asyncio.sleep(self.scale * time)
        functions = [{"function": {"name": name, "arguments": json.dumps(arguments)}} for name, arguments in calls]
        return Message(reasoning, content, *map(tuple, read_calls(functions, calls_before(messages))))

    def main(self, messages, step, agent):
        """Five towers, one of them twice; what failed and the others; the answer."""
        give = lambda kind, *towers: [("assign_task", {"agent": kind, "prompt": f"How high is the {tower} tower?"}) for tower in towers]  # noqa: E731
        if step == 0:
            kinds = [("create_subagent", {"name": kind, "system_prompt": f"You are a {kind}. {rule}"}) for kind, rule in
                     (("reader", "You look one thing up and answer in one line."), ("surveyor", "You compare what several pages say."))]  # fmt: skip
            return "Five first, the others when I know how long one takes.", "", kinds + give("reader", "ash", "birch", "cedar") + give(
                "surveyor", "elm", "fir") + give("reader", "ash"), 3  # fmt: skip
        if step == 1:
            return "birch failed: once more, with those that are left.", "", give("reader", "birch", "oak", "pine") + give("surveyor", "rowan"), 2
        return "63 metres is the most.", "The fir tower, 63 metres.", [], 2

    def sub(self, messages, step, agent):
        """Looks a tower up; some are slower, one fails the first time."""
        tower = re.search(r"the (\w+) tower", messages[1]["content"])[1]
        number, page = list(HEIGHTS).index(tower), ("browse", {"page": f"towers/{tower}.md"})
        if step == 0:
            return f"Where is {tower}?", "", [("search", {"query": f"{tower} tower height"})], 1 + number % 3
        if tower == "birch" and agent == "2":
            raise PolicyError("the model's server answers 503: overloaded (6 tries)")
        if step <= number % 4:
            return "Other pages may tell more.", "", [page, *(("browse", {"page": f"towers/{other}.md"}) for other in list(HEIGHTS)[:step])], 2
        return "", f"{tower}: {HEIGHTS[tower]} metres", [], 1 + number % 2


def play(policy, pages=PAGES, question=QUESTION, **limits):
    """The events of a run."""
    log = Log(None)
    asyncio.run(Swarm(question, policy, Corpus.of(pages), log, Limits(**limits)).run())
    return log.events


@pytest.fixture(scope="module")
def run():
    """(events, the policy) of a run with eight subtasks in two stages, a failure and a refusal; it takes a fifth of a second."""
    policy = Scripted(0.01)
    return play(policy), policy


def shown(agent):
    """The context of an agent in the form of `sent`."""
    return [(m["role"], m["text"], m.get("reasoning", ""), m.get("calls", [])) for m in agent["messages"]]


def sent(messages):
    """What an agent was sent, message by message."""
    return [(m["role"], m["content"], m.get("reasoning_content", ""), [[call["function"]["name"], call["function"]["arguments"]] for call in
             m.get("tool_calls", ())]) for m in messages]  # fmt: skip


# What it tells


def test_the_figures_are_those_of_the_log(run):
    events, _ = run
    told = facts(events, {"item-F1": 0.75, "reward": float("nan")})
    stages = episode(events)
    assert (told["status"], told["answer"]) == ("done", "The fir tower, 63 metres.")
    figures = told["figures"]
    assert (int(figures["critical steps"]), int(figures["total steps"])) == (critical_steps(stages), total_steps(stages)) == (13, 32)
    assert [figures[key] for key in ("subtasks", "refused", "r_parallel", "r_finish", "redundancy")] == ["9", "1", "1", "0.8", "0.1"]
    assert (figures["item-F1"], figures["reward"], told["models"]) == ("0.75", "not known", ["a script"])
    assert int(figures["tool calls"]) == sum(event["ran"] for event in events if event["kind"] == "call")


def test_numbers_of_the_logs_end_are_figures_too(run):
    events = [*run[0][:-1], run[0][-1] | {"item_f1": 0.5}]
    assert facts(events)["figures"]["item_f1"] == "0.5"


def test_there_is_a_lane_for_every_agent_and_its_end_is_told(run):
    agents = facts(run[0])["agents"]
    assert [(agent["name"], agent["kind"]) for agent in agents] == [
        ("main", ""), *((str(n), "reader") for n in (1, 2, 3)), ("4", "surveyor"), ("5", "surveyor"), *((str(n), "reader") for n in (6, 7, 8)),
        ("9", "surveyor")]  # fmt: skip
    assert [agent["state"] for agent in agents] == ["ok", "ok", "failed", *["ok"] * 7]
    assert (agents[2]["status"], agents[6]["again"]) == ("failed", "2") and "503: overloaded" in agents[2]["told"]
    (refusal,) = [box for agent in agents for box in agent["boxes"] if box["state"] == "refused"]
    assert agents[0]["messages"][refusal["message"]]["text"].startswith("Refused: reader was given this very task, number 1")


class Erring(Scripted):
    """A subagent with 2, whose answers cannot be used, and others that go on for ever."""

    def sub(self, messages, step, agent):
        """As told."""
        words = "" if agent == "2" else f"so far {step}"
        calls = [] if agent == "2" else [("search", {"query": "ash"}), ("fly", {}), ("browse", {"page": "towers/oak.md"})]
        return "hm", words, calls, 1


@pytest.mark.parametrize(
    ("kind", "limits", "statuses"),
    [
        (Scripted, {}, {"done", "failed"}),
        (Erring, {"sub_steps": 4}, {"done", "steps", "garbage"}),
        (Erring, {"sub_steps": 6, "critical_steps": 8}, {"critical steps", "steps", "garbage"}),
        (Erring, {"sub_steps": 9, "context": 5000, "garbage": 4}, {"context", "garbage"}),
        (Erring, {"main_steps": 2, "sub_steps": 3, "garbage": 2, "observation": 30}, {"steps", "garbage"}),
        (Erring, {"critical_steps": 3}, {"critical steps", "steps"}),
        (Scripted, {"tool_calls": 9, "own_calls": 1}, {"done", "failed"}),
    ],
)
def test_a_context_is_word_for_word_what_the_agent_was_sent(kind, limits, statuses):
    policy = kind()
    told = facts(play(policy, **limits))
    assert {agent["status"] for agent in told["agents"]} == statuses
    for agent in told["agents"]:
        last = sent(policy.seen[agent["name"]])
        assert shown(agent)[: len(last)] == last
        rest = shown(agent)[len(last) :]
        if agent["status"] in ("done", "garbage"):  # the last answer, which nobody was sent
            assert [role for role, *_ in rest] == ["assistant"]


def test_the_critical_path_is_the_longest_and_every_answer_stands_behind_those_that_it_waits_for(run):
    for events in (run[0], play(Erring(), sub_steps=5)):
        told, graph = facts(events), step_graph(events)
        assert [name for _, _, name in told["path"]] == [named(step) for step in longest_path(graph)] and len(told["path"]) == told["steps"]
        ends = {(agent["name"], box["step"]): box["to"] for agent in told["agents"] for box in agent["boxes"] if box["what"] == "answer"}
        assert max(ends.values()) == critical_steps(episode(events))
        for (name, step), waits in graph.items():
            assert ends[str(name), step] == 1 + max((ends[str(other), place] for other, place in waits), default=0)
        marked = {(agent["name"], box["step"]) for agent in told["agents"] for box in agent["boxes"] if box.get("critical")}
        assert marked == {(str(name), step) for name, step in longest_path(graph)}


def test_boxes_lie_within_their_lane_on_both_axes(run):
    told = facts(run[0])
    for agent in told["agents"]:
        assert 0 <= agent["begin"] <= agent["end"] <= told["seconds"] and 0 <= agent["from"] <= agent["to"] <= told["steps"]
        for box in agent["boxes"]:
            assert agent["begin"] - 0.005 <= box["begin"] <= box["end"] <= agent["end"]
            assert agent["from"] <= box["from"] <= box["to"] <= agent["to"]


# Logs that are not whole


def test_a_run_that_was_killed_after_any_event_has_a_page(run):
    events, _ = run
    for count in range(1, len(events)):
        told = facts(events[:count])
        assert told["status"] == "unfinished" and told["steps"] == critical_steps(episode(events[:count]))
        assert len(told["agents"]) == 1 + sum(event["kind"] == "assign" for event in events[:count])
        ended = {str(event["task"]) for event in events[:count] if event["kind"] == "result"}
        assert {agent["name"] for agent in told["agents"] if agent["state"] != "open"} == ended
        assert trace(events[:count])


def test_the_time_between_a_kill_and_its_resumption_is_left_out_and_clocks_may_be_set_back(run):
    events = copy.deepcopy(run[0])
    cut = len(events) // 2
    late = [event | {"n": event["n"] + 1, "at": event["at"] + 3600} for event in events[cut:]]
    told = facts([*events[:cut], {"n": cut, "at": late[0]["at"], "kind": "resume"}, *late])
    assert told["seconds"] <= facts(events)["seconds"] and len(told["resumed"]) == 1
    for event in events[cut:]:
        event["at"] -= 7200
    told = facts(events)
    assert 0 <= told["seconds"] < 60 and all(box["begin"] <= box["end"] for agent in told["agents"] for box in agent["boxes"])


def test_what_is_no_run_is_told_in_one_line(run):
    for events in ([], run[0][1:], [run[0][0], {"n": 1, "at": 0.0, "kind": "answer"}], [run[0][0] | {"limits": 3}, *run[0][1:]],
                   [event for event in run[0] if event["kind"] != "assign"],
                   [event for event in run[0] if (event["kind"], event.get("agent"), event.get("step")) != ("answer", "main", 0)]):  # fmt: skip
        with pytest.raises(LogError, match=r"^(the log has no run|the events are not those of a swarm).*$"):
            trace(events)


# The command line


def test_a_run_writes_its_page_when_it_ends_and_when_its_model_is_gone_and_the_command_writes_it_again(tmp_path, capsys, monkeypatch):
    policy = Scripted()
    monkeypatch.setattr(command, "local_policy", lambda *_: policy)
    for name, text in PAGES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    words = ["run", "--local", "none", "--corpus", str(tmp_path / "towers"), "--no-python", "--run", str(tmp_path / "run")]
    log, page = tmp_path / "run" / "events.jsonl", tmp_path / "run" / "trace.html"
    monkeypatch.setattr(policy, "main", lambda *_: (_ for _ in ()).throw(PolicyError("nobody answers")))
    assert command.main([*words, QUESTION]) == 2
    assert page.read_text() == trace(read_log(log)) and '"status": "unfinished"' in page.read_text()
    monkeypatch.undo()
    monkeypatch.setattr(command, "local_policy", lambda *_: policy)
    assert command.main([*words, "--resume"]) == 0
    assert '"status": "done"' in page.read_text()
    assert command.main(["trace", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text() == page.read_text() == trace(read_log(log))
    page.unlink()
    assert command.main(["trace", "--run", str(tmp_path / "run")]) == 0 and page.is_file()
    capsys.readouterr()
    for run, out, why in ((tmp_path / "none", page, "cannot be read"), (tmp_path / "run", tmp_path / "none" / "x.html", "No such file")):
        assert command.main(["trace", "--run", str(run), "--out", str(out)]) == 2
        assert why in (told := capsys.readouterr().err) and told.count("\n") == 1


# The page


def hostile():
    """Events of a run in which every text is hostile."""

    class Policy(Scripted):
        def main(self, messages, step, agent):
            calls = [("create_subagent", {"name": "<b>x</b>", "system_prompt": HOSTILE}), ("assign_task", {"agent": "<b>x</b>", "prompt": HOSTILE})]
            return HOSTILE, HOSTILE, [] if step else calls, 1

        def sub(self, messages, step, agent):
            return HOSTILE, HOSTILE, [] if step else [("browse", {"page": "a.md"}), ("<i>fly</i>", {HOSTILE: HOSTILE})], 1

    return play(Policy(), {"a.md": HOSTILE.replace("\ud800", "")}, HOSTILE)


def test_the_page_has_three_blocks_its_policy_knows_both_programs_and_nothing_of_the_log_is_markup(run):
    for events in (run[0], hostile()):
        page = trace(events, {"<u>": 1.0})
        page.encode()
        assert (page.count("<script"), page.count("</script"), page.count("<style"), page.count("<img")) == (2, 2, 1, 0)
        data = re.search(r'<script type="application/json" id="facts">(.*)</script>', page)[1]
        assert "<" not in data and json.loads(data) == json.loads(json.dumps(facts(events, {"<u>": 1.0})))
        policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="(.*)">', page)[1]
        assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy
        for tag in ("script", "style"):
            text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
            assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
        assert not re.search(r"""\b(src|href|action)\s*=|@import|url\(|innerHTML|\beval\b|fetch\(""", page.replace(data, ""))


# In a browser


in_a_browser = pytest.mark.xdist_group("browser")


def opened(browser, folder, page):
    """Open a page from a file. Returns a function from a CSS selector to the elements that it finds."""
    (folder / "trace.html").write_text(page, encoding="utf-8")
    browser.get((folder / "trace.html").as_uri())
    return lambda selector: browser.find_elements("css selector", selector)


def complaints(browser):
    """Lines of the console."""
    return [line["message"] for line in browser.get_log("browser")]


@in_a_browser
def test_a_click_on_a_lane_shows_its_agent_and_the_critical_path_is_the_longest(run, browser, tmp_path):
    events, _ = run
    find = opened(browser, tmp_path, trace(events))
    assert find("#path")[0].text == " → ".join(named(step) for step in longest_path(step_graph(events)))
    assert find("#question")[0].text == QUESTION and "done" in find("#status")[0].text
    lanes = find(".lane")
    assert len(lanes) == 10 and lanes[5].text.splitlines()[0] == "5 surveyor"
    assert ORCHESTRATOR in find("#panel")[0].text  # main's, before any click
    lanes[4].find_element("css selector", "button").click()
    told = find("#panel")[0].text
    for words in ("4 surveyor", "You are a surveyor.", "How high is the elm tower?", "Where is elm?", "elm tower height", "It is 28 metres high.",
                  "elm: 28 metres", "what main was told"):  # fmt: skip
        assert words in told
    assert ORCHESTRATOR not in told and "Five first" not in told
    lanes[2].click()
    assert "failed" in find("#panel .word")[0].text and "503: overloaded" in find("#panel .told")[0].text
    assert not complaints(browser)


@in_a_browser
def test_a_click_on_a_box_or_a_step_of_the_path_opens_what_it_stands_for(run, browser, tmp_path):
    find = opened(browser, tmp_path, trace(run[0]))
    find(".lane .box.refused")[0].click()
    (here,) = find("article.here")
    assert "Refused: reader was given this very task, number 1" in here.text and "assign_task" in here.text
    place, step, name = facts(run[0])["path"][2]
    next(button for button in find("#path button") if button.text == name).click()
    (here,) = find("article.here")
    assert here.text.startswith(f"answer {step}") and "on the critical path" in here.text
    assert find(".lane.chosen b")[0].text.startswith(name.split("/")[0])
    assert not complaints(browser)


@in_a_browser
def test_on_the_axis_of_critical_steps_the_path_covers_every_step_and_the_lanes_are_as_long_as_their_agents(run, browser, tmp_path):
    find = opened(browser, tmp_path, trace(run[0]))

    def spots(selector):
        script = "return [...document.querySelectorAll(arguments[0])].map(box => box.getBoundingClientRect()).map(box => [box.x, box.width])"
        return browser.execute_script(script, selector)

    assert len(spots(".lane .box.critical")) == 13
    find("#axis-steps")[0].click()
    critical = sorted(spots(".lane .box.critical"))
    width = critical[0][1]
    assert all(abs(x - critical[0][0] - n * width) < 2 and abs(w - width) < 2 for n, (x, w) in enumerate(critical))
    for agent, (_, span) in zip(facts(run[0])["agents"], spots(".lane .span"), strict=True):
        assert abs(span - (agent["to"] - agent["from"]) * width) < 2
    drawn = browser.execute_script("const p = document.querySelector('#thread path').getBBox(); return [p.x, p.width, p.height]")
    assert abs(drawn[1] - 13 * width) < 3 and drawn[2] > 50
    assert not complaints(browser)


@in_a_browser
def test_all_of_it_is_reached_with_the_keyboard(run, browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    find = opened(browser, tmp_path, trace(run[0]))
    press = lambda *keys: [browser.switch_to.active_element.send_keys(key) for key in keys]  # noqa: E731

    def tab_to(selector):
        for _ in range(8):
            press(Keys.TAB)
            if browser.execute_script("return document.activeElement.matches(arguments[0])", selector):
                return
        pytest.fail(f"Tab does not come to {selector}")

    tab_to("#path button")
    press(Keys.ARROW_RIGHT, Keys.ENTER)
    assert find("#panel h2")[0].text == "4 surveyor" and find("article.here h3")[0].text.startswith("answer 0")
    press(Keys.ESCAPE, Keys.ARROW_UP, Keys.ARROW_UP, Keys.ENTER)
    assert find("#panel h2")[0].text == "2 reader" and browser.switch_to.active_element.get_attribute("id") == "panel"
    press(Keys.ESCAPE, Keys.END, Keys.ENTER)
    assert find("article.here h3")[0].text.startswith("result of search") and find("#panel h2")[0].text == "2 reader"
    browser.refresh()
    tab_to("#axis-steps")
    press(Keys.SPACE)
    assert find("#axis-steps")[0].get_attribute("aria-pressed") == "true"
    tab_to(".lane button")
    assert not complaints(browser)


@in_a_browser
def test_hostile_texts_do_nothing_and_the_policy_lets_nothing_else_run_or_load(browser, tmp_path):
    find = opened(browser, tmp_path, trace(hostile(), {"<u>": 1.0}))
    for place in (0, 1):
        find(".lane")[place].click()
        read = "return document.getElementById('panel').innerText.toWellFormed()"  # half a surrogate pair cannot leave the browser
        assert "</script><script>window.bad = 1</script><img src=x" in browser.execute_script(read)
    assert find(".lane b")[1].text == "1 <b>x</b>" and not complaints(browser)
    loaded = "performance.getEntriesByType('resource').length, document.querySelectorAll('img, u').length"
    assert browser.execute_script(f"return [window.bad === undefined, {loaded}]") == [True, 0, 0]
    browser.execute_script("""document.body.insertAdjacentHTML('beforeend', '<img src="x.png" onerror="window.bad = 3">');
        const script = document.createElement('script'); script.textContent = 'window.bad = 4'; document.body.append(script);""")
    assert browser.execute_script("return window.bad === undefined")
    assert sum("Content Security Policy" in line for line in complaints(browser)) >= 2


@in_a_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_telephone_shows_it_without_scrolling_aside_and_letters_stand_out(run, browser, tmp_path, dark):
    find = opened(browser, tmp_path, trace(run[0]))
    send = browser.execute_cdp_cmd
    try:
        send("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
        send("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})
        browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")  # the lanes are drawn again first
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        assert find(".lane b")[3].is_displayed() and find(".lane .box")[0].rect["width"] >= 5
        colours = "const style = getComputedStyle(arguments[0]); return [style.color, style.backgroundColor]"
        marked = ("body", ".lane .box.critical", ".lane .box.refused", "[aria-pressed=true]")
        pairs = [browser.execute_script(colours, find(selector)[0]) for selector in marked]
        pairs.append([pairs[0][0], browser.execute_script(colours, find("#panel")[0])[1]])
        for pair in pairs:
            bright, dim = sorted(map(luminance, pair), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4, pair
        assert (luminance(pairs[0][1]) < 0.2) == dark
    finally:
        send("Emulation.clearDeviceMetricsOverride", {})
        send("Emulation.setEmulatedMedia", {"features": []})
    assert not complaints(browser)


def luminance(colour):
    """Relative luminance of a CSS colour, as of WCAG 2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))
