"""A run of a swarm as one HTML page to look into: lanes, the critical path, every agent's context — K2.5 report 3.

    page = trace(read_log("runs/swarm/events.jsonl"))       # str; python swarm.py trace --run runs/swarm writes it

All of it is read off the events of swarm_log.py, so a run that was killed or still works has its page too. Each agent has a lane:
the orchestrator, then the subtasks in the order in which they were given away. Answers and tool calls are boxes, over seconds or over
critical steps: there an answer is one wide and ends at the length of the longest chain of answers that ends with it. Seconds leave
out the time between a process that was killed and the one that went on. A click on a lane or a box shows what that agent saw.

Pages of a corpus and answers of models are somebody else's text. The page carries them as JSON without a `<`, shows them as text
only, and its content security policy lets no script run but its own and nothing be loaded.

Public names: trace, facts, named.     Tests: pytest tests/test_swarm_trace.py
"""

import base64
import hashlib
import json
import string

from critical import critical_steps, finish_reward, longest_path, normalised, parallel_reward, redundancy, total_steps
from swarm_log import LogError, episode, read_message, refused, step_graph

# ------------------------------------------------------------------------------------------------ facts

STATES = {"done": "ok", "steps": "cut", "critical steps": "cut", "context": "cut", "unfinished": "open"}  # others failed


def named(step):
    """An (agent, step) of a graph in a word: "main 0", "2/1"."""
    return f"main {step[1]}" if step[0] == "main" else f"{step[0]}/{step[1]}"


def _clock(events):
    """Seconds since the start of every event; what passed before a run was resumed is left out, and none runs backwards."""
    seconds, now, before = [], 0.0, events[0]["at"]
    for event in events:
        now += 0.0 if event["kind"] == "resume" else max(0.0, event["at"] - before)
        before = event["at"]
        seconds.append(round(now, 3))
    return seconds


class _Run:
    """Events by what they are about. level: critical steps up to and with an answer, {(agent, step): int}; path: a longest chain."""

    def __init__(self, events):
        self.start, self.clock = events[0], _clock(events)
        self.limits, self.end = self.start["limits"], next((event for event in events if event["kind"] == "end"), None)
        self.answers, self.returned, self.assigned, self.results, self.prompts, self.firsts = {}, {}, {}, {}, {}, {}
        for event in events:
            match event["kind"]:
                case "answer":
                    self.answers[event["agent"], event["step"]] = event
                case "call":
                    self.returned[event["agent"], event["step"], event["place"]] = event
                case "create":
                    self.prompts[event["name"]] = event["system_prompt"]
                case "assign":
                    self.assigned[event["task"]] = event
                    self.firsts.setdefault(normalised(event["prompt"]), event["task"])
                case "result":
                    self.results[event["task"]] = event
        self.given = {(event["step"], event["place"]): task for task, event in self.assigned.items()}
        graph = step_graph(events)
        self.path, self.level, self.last = longest_path(graph), {}, {}
        for (name, step), waits in graph.items():  # an answer stands behind all that it waits for
            self.level[name, step] = self.last[name] = 1 + max((self.level[other] for other in waits), default=0)
        self.critical = set(self.path)

    def stage(self, step):
        """(the subtasks that a step of main gave away, the critical steps at the end of the longest one)."""
        tasks = [task for task, event in self.assigned.items() if event["step"] == step]
        return tasks, max([self.level["main", step], *(self.last[task] for task in tasks if task in self.last)])

    def left(self, name, step):
        """How many answers the limits leave an agent behind this one."""
        if name == "main":
            return min(self.limits["main_steps"] - step - 1, self.limits["critical_steps"] - self.stage(step)[1])
        given = self.level["main", self.assigned[name]["step"]]
        return min(self.limits["sub_steps"], self.limits["critical_steps"] - given - 1) - step - 1

    def ended(self, name):
        """(second, status) of an agent's end; where it has not ended, the log's."""
        event = self.end if name == "main" else self.results.get(name)
        return (self.clock[event["n"]], event["status"]) if event else (self.clock[-1], "unfinished")


def _state(run, call, child):
    """How a call looks. call: its event, or None; child: the subtask that it gave away, or None."""
    if child is not None:
        return STATES.get(run.ended(child)[1], "failed")
    if call is None:
        return "open"
    return "refused" if call["text"].startswith("Refused") else "failed" if call["text"].startswith("Error") else "ok"


def _context(run, name, system, prompt):
    """What an agent saw, message by message, and its boxes: (list of dicts, list of dicts). A box names the message that it opens."""
    messages, boxes, main = [{"role": "system", "text": system}, {"role": "user", "text": prompt}], [], name == "main"
    step = useless = 0
    while event := run.answers.get((name, step)):
        message, at, level = read_message(event["message"], 0), run.clock[event["n"]], run.level[name, step]
        calls, critical, answer = message.tool_calls, (name, step) in run.critical, len(messages)
        wrong = bool(message.errors) or not (calls or message.content.strip())
        state = "failed" if wrong else "ok"
        boxes.append({"what": "answer", "label": str(step), "state": state, "begin": max(0.0, at - event["seconds"]), "end": at,
                      "from": level - 1, "to": level, "step": step, "critical": critical, "message": answer})  # fmt: skip
        messages.append({"role": "assistant", "text": message.content, "reasoning": message.reasoning, "errors": message.errors, "step": step,
                         "calls": [[call.name, call.raw] for call in calls], "seconds": event["seconds"], "state": state,
                         "critical": critical})  # fmt: skip
        useless = 0 if calls else useless + 1
        if not calls and not wrong or useless == run.limits["garbage"]:
            break
        for place, call in enumerate(calls):
            returned, child = run.returned.get((name, step, place)), run.given.get((step, place)) if main else None
            state, seconds = _state(run, returned, child), returned["seconds"] if returned else None
            if child is None:  # subtasks have lanes of their own
                end = run.clock[returned["n"]] if returned else run.clock[-1]
                boxes.append({"what": "call", "label": call.name, "state": state, "begin": max(at, end - seconds) if returned else at, "end": end,
                              "from": level - 1 + place / len(calls), "to": level - 1 + (place + 1) / len(calls), "step": step,
                              "message": len(messages)})  # fmt: skip
            messages.append({"role": "tool", "text": returned["text"] if returned else "", "call": call.name, "step": step, "state": state,
                             "seconds": seconds, "child": "" if child is None else str(child)})  # fmt: skip
        tasks, last = run.stage(step) if main else ((), 0)
        if tasks:
            seconds, states = zip(*(run.ended(task) for task in tasks))
            boxes.append({"what": "wait", "label": f"waits for {len(tasks)}", "state": "open" if "unfinished" in states else "ok", "begin": at,
                          "end": max(seconds), "from": level, "to": last, "step": step, "message": answer})  # fmt: skip
        if wrong:
            what = "; ".join(message.errors) or "an answer without words and without a call"
            messages.append({"role": "system", "text": f"Error: {what}"[: run.limits["observation"]], "state": "failed"})
        if run.left(name, step) == 1 and all((name, step, place) in run.returned for place in range(len(calls))):
            messages[-1]["text"] += "\n[One step is left: answer now.]"
        step += 1
    return messages, boxes


def _agent(run, name):
    """What the page shows of one agent, a dict; begin and end in seconds, from and to in critical steps."""
    second, status = run.ended(name)
    if name == "main":
        kind, prompt, begin, start, again, told = "", run.start["question"], 0.0, 0, "", ""
        system, why, end = run.start.get("system", ""), run.end["why"] if run.end else "", max(run.level.values(), default=0)
    else:
        given = run.assigned[name]
        kind, prompt, why = given["agent"], given["prompt"], ""
        begin, start = run.clock[given["n"]], run.level["main", given["step"]]
        system, end = run.prompts.get(kind, ""), run.last.get(name, start)
        first = run.firsts[normalised(prompt)]
        again = "" if first == name else str(first)
        told = run.results[name]["text"] if name in run.results else ""
    messages, boxes = _context(run, name, system, prompt)
    size = sum(len(message["text"]) + len(message.get("reasoning", "")) + sum(map(len, sum(message.get("calls", ()), []))) for message in messages)
    return {"name": str(name), "kind": kind, "status": status, "state": STATES.get(status, "failed"), "why": why, "again": again, "told": told,
            "begin": begin, "end": second, "from": start, "to": end, "size": size, "messages": messages, "boxes": boxes}  # fmt: skip


def facts(events, rewards=None):
    """All that the page shows, a dict that JSON can hold.

    events: list of dicts, of a Log or read_log; rewards: {name: number}, shown beside those of the log's end.
    Raises LogError when the events are not those of a run.
    """
    if not events or events[0]["kind"] != "start":
        raise LogError("the log has no run: its first event is not a start")
    try:
        return _facts(_Run(events), events, rewards or {})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise LogError(f"the events are not those of a swarm: {type(error).__name__} {error}") from error


def _facts(run, events, rewards):
    end, stages = run.end or {}, episode(events)
    critical, total = critical_steps(stages), total_steps(stages)
    measured = {key: value for key, value in end.items() if type(value) in (int, float) and key not in ("n", "at")}
    figures = {
        "critical steps": critical, "total steps": total, "steps at once, mean": total / critical if critical else 0, "subtasks": len(run.assigned),
        "refused": refused(events), "tool calls": sum(bool(call["ran"]) for call in run.returned.values()), "seconds": run.clock[-1],
        "r_parallel": parallel_reward(stages), "r_finish": finish_reward(stages), "redundancy": redundancy(stages), **measured, **rewards,
    }  # fmt: skip
    shown = {key: "not known" if value != value else f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in figures.items()}
    agents = [_agent(run, name) for name in ("main", *sorted(run.assigned))]
    places = {agent["name"]: place for place, agent in enumerate(agents)}
    return {
        "question": run.start["question"], "status": end.get("status", "unfinished"), "state": agents[0]["state"], "why": agents[0]["why"],
        "answer": end.get("text", ""), "figures": shown, "models": list(dict.fromkeys(run.start["models"])), "limits": run.limits,
        "seconds": run.clock[-1], "steps": critical, "agents": agents,
        "path": [[places[str(name)], step, named((name, step))] for name, step in run.path],
        "stages": [[box["begin"], box["from"]] for box in agents[0]["boxes"] if box["what"] == "answer"],
        "resumed": [run.clock[event["n"]] for event in events if event["kind"] == "resume"],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; --page: #faf9f7; --card: #ffffff; --ink: #1d1d20; --soft: #66656c; --line: #dbd8d1; --span: #e9e7e1;
  --answer: #8fa6cc; --call: #c3d0e6; --path: #d6450b; --on-path: #ffffff; --failed: #b3261e; --refused: #a86b00; --cut: #74489b; --ok: #2f7d46;
  --label: 12.5rem; }
@media (prefers-color-scheme: dark) { :root { --page: #141519; --card: #1c1e24; --ink: #e9e7e4; --soft: #a09fa8; --line: #353740; --span: #272930;
  --answer: #52699a; --call: #3a4a6b; --path: #ff8648; --on-path: #1a0d05; --failed: #ff7468; --refused: #e9b045; --cut: #bd97e4; --ok: #71c48b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.25rem 2rem; max-width: 120rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.25rem; margin: .25rem 0; max-height: 7.5em; overflow: auto; overflow-wrap: anywhere; white-space: pre-wrap; }
h2 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p { margin: .4rem 0; }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; text-align: left; cursor: pointer; }
:focus-visible { outline: 2px solid var(--path); outline-offset: 2px; }
pre { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow: auto; font: 12.5px/1.5 ui-monospace,
  "DejaVu Sans Mono", monospace; unicode-bidi: plaintext; }
.soft { color: var(--soft); font-size: .87rem; }
.ok { --state: var(--ok); } .failed { --state: var(--failed); } .cut { --state: var(--cut); } .refused { --state: var(--refused); }
.open { --state: var(--soft); }
.word { color: var(--state); font-weight: 600; }
#answer { border-left: 3px solid var(--line); padding-left: .75rem; max-height: 12rem; font: inherit; }
dl { display: flex; flex-wrap: wrap; gap: .5rem; margin: .75rem 0; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .25rem .6rem; }
dt { color: var(--soft); font-size: .78rem; } dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; }
.switch { display: inline-flex; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
.switch button { padding: .3rem .7rem; } .switch [aria-pressed=true] { background: var(--ink); color: var(--page); }
.controls label { display: inline-flex; gap: .5rem; align-items: center; } .controls input { width: 7rem; accent-color: var(--path); }
.scroller { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; background: var(--card); margin-top: .6rem; }
#chart { position: relative; min-width: 100%; }
#ticks { position: sticky; top: 0; z-index: 4; height: 1.6rem; margin-left: var(--label); background: var(--card);
  border-bottom: 1px solid var(--line); font-size: .75rem; color: var(--soft); }
#ticks span { position: absolute; top: .25rem; padding-left: 3px; border-left: 1px solid var(--line); white-space: nowrap; }
#lanes { list-style: none; margin: 0; padding: 0; }
.lane { display: flex; border-bottom: 1px solid var(--line); cursor: pointer; scroll-margin-top: 2rem; } .lane:last-child { border: 0; }
.lane > button { position: sticky; left: 0; z-index: 3; flex: 0 0 var(--label); width: var(--label); padding: .3rem .6rem; background: var(--card);
  border-left: 4px solid transparent; overflow: hidden; outline-offset: -3px; }
.lane.chosen > button { border-left-color: var(--path); background: var(--span); }
.lane b, .lane small { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; unicode-bidi: isolate; }
.lane small { color: var(--soft); }
.track { position: relative; flex: 1; min-width: 0; min-height: 2.6rem; }
.track > * { position: absolute; }
.span { top: 3px; bottom: 3px; background: var(--span); border-radius: 3px; min-width: 3px; }
.span.failed, .span.cut { border: 1px solid var(--state); background: repeating-linear-gradient(135deg, var(--span) 0 7px,
  color-mix(in srgb, var(--state) 30%, var(--span)) 7px 10px); }
.span.open { border: 1px dashed var(--state); border-right: 0; }
.end { top: 50%; translate: 3px -50%; color: var(--state); font-size: .8rem; font-weight: 700; white-space: nowrap; }
.box { min-width: 5px; height: 16px; overflow: hidden; border-radius: 2px; background: var(--answer); font-size: 10px; line-height: 16px;
  text-indent: 3px; white-space: nowrap; box-shadow: inset 0 0 0 .5px var(--card); z-index: 2; outline-offset: 0; }
.box.call { background: var(--call); height: 12px; line-height: 12px; }
.box.wait { background: none; border-bottom: 2px dotted var(--soft); border-radius: 0; color: var(--soft); box-shadow: none; z-index: 1; }
.box.failed, .box.refused { background: var(--state); color: var(--card); }
.box.refused { border-radius: 6px; } .box.open { background: none; border: 1px dashed var(--soft); }
.box.critical { background: var(--path); color: var(--on-path); font-weight: 700; }
.box.critical.failed { box-shadow: inset 0 -4px var(--failed); }
.box.here { outline: 2px solid var(--ink); }
.rule { top: 0; bottom: 0; border-left: 1px dotted var(--line); } .rule.resumed { border-left: 2px dashed var(--refused); }
#thread { position: absolute; left: var(--label); top: 0; width: calc(100% - var(--label)); height: 100%; pointer-events: none; }
#thread path { fill: none; stroke: var(--path); stroke-width: 1.5px; vector-effect: non-scaling-stroke; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1rem; font-size: .8rem; color: var(--soft); }
.legend span { display: inline-flex; gap: .35rem; align-items: center; } .legend i { position: static; display: inline-block; width: 1.6rem; }
.legend .span { height: 14px; }
#path { line-height: 1.9; max-height: 6.5rem; overflow: auto; }
#path button { border-bottom: 2px solid var(--path); font-variant-numeric: tabular-nums; }
#panel { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 0 1rem 1rem; margin-top: 1.25rem; min-width: 0; }
#panel:focus-visible { outline: 0; border-color: var(--path); }
#panel header { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; justify-content: space-between; }
#panel header h2 { margin: .8rem 0 .2rem; unicode-bidi: isolate; overflow-wrap: anywhere; }
#panel header button { text-decoration: underline; }
article { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .75rem; margin: .75rem 0; }
article.assistant { border-left-color: var(--answer); } article.tool { border-left-color: var(--call); }
article.failed, article.refused, article.cut { border-left-color: var(--state); } article.critical { border-left-color: var(--path); }
article.here { background: var(--span); }
article h3 { font-size: .87rem; margin: 0; display: flex; flex-wrap: wrap; gap: 0 .6rem; overflow-wrap: anywhere; }
article h3 span { font-weight: 400; color: var(--soft); } article h3 .word { font-weight: 600; color: var(--state); }
article h3 .critical { color: var(--path); font-weight: 600; }
summary { cursor: pointer; color: var(--soft); font-size: .87rem; }
.asked { background: var(--page); border: 1px solid var(--line); border-radius: 4px; padding: .3rem .6rem; margin: .35rem 0; }
.asked pre { margin: .1rem 0; }
.asked b { font: 600 12.5px ui-monospace, "DejaVu Sans Mono", monospace; }
@media (min-width: 75rem) { main { display: grid; grid-template-columns: minmax(0, 1.6fr) minmax(0, 1fr); gap: 1.5rem; align-items: start; }
  .scroller { max-height: calc(100vh - 5rem); overflow-y: auto; }
  #panel { position: sticky; top: .75rem; max-height: calc(100vh - 1.5rem); overflow: auto; } #panel header button { display: none; } }
@media (max-width: 45rem) { :root { --label: 0px; } body { padding: .75rem; } .controls .soft { display: none; }
  .lane { flex-direction: column; }
  .lane > button { flex: none; width: 100%; max-width: calc(100vw - 1.75rem); padding: .25rem .5rem 0; display: flex; gap: .6rem; }
  .lane b, .lane small { flex: 0 1 auto; } .track { flex: none; } }
"""

SCRIPT = """
"use strict";
const facts = JSON.parse(document.getElementById("facts").textContent);
const at = id => document.getElementById(id);
const MARKS = {ok: "✓", failed: "✕", cut: "⊣", refused: "⊘", open: "…"};
const WORDS = {failed: "failed", cut: "cut off at a limit", refused: "refused", open: "not returned"};
let axis = "seconds", chosen = 0, here = -1;

// Somebody else's text comes in as text nodes and attribute values only.
function make(tag, names, ...inside) {
  const element = document.createElement(tag);
  element.className = names || "";
  element.append(...inside.filter(part => part || part === 0));
  return element;
}
const seconds = value => value < 10 ? value.toFixed(2) + " s" : value < 600 ? value.toFixed(0) + " s" : (value / 60).toFixed(0) + " min";
const count = (number, word) => number + " " + word + (number === 1 ? "" : "s");
const title = agent => agent.name === "main" ? "main" : agent.name + " " + agent.kind;
const steps = agent => agent.boxes.filter(box => box.what === "answer").length;

function header() {
  at("question").textContent = facts.question;
  document.title = "Agent Swarm: " + facts.question.slice(0, 80);
  at("status").className = facts.state;
  at("status").append(make("span", "word", MARKS[facts.state] + " " + facts.status), facts.why && " (" + facts.why + ")");
  if (facts.state === "open") at("status").append(": the log ends here; the run works still, or was stopped");
  at("answer").textContent = facts.answer;
  at("answer").hidden = !facts.answer;
  const card = ([name, value]) => make("div", "", make("dt", "", name), make("dd", "", String(value)));
  at("figures").append(...Object.entries(facts.figures).map(card));
  at("limits").append(...Object.entries(facts.limits).map(card));
  at("models").textContent = "limits; " + count(facts.models.length, "model") + ": " + facts.models.join(", ");
}

// The length of the axis, with room for a mark behind the last; the two ends of something as shares of it.
const whole = () => 1.04 * Math.max(facts[axis], axis === "steps" ? 1 : 0.001);
const ends = thing => (axis === "steps" ? [thing.from, thing.to] : [thing.begin, thing.end]).map(value => value / whole());
function put(element, first, last) {
  element.style.left = 100 * first + "%";
  if (last !== undefined) element.style.width = 100 * (last - first) + "%";
  return element;
}

function tell(agent, box) {
  const what = {answer: "answer " + box.label, call: box.label, wait: box.label + " subtasks"}[box.what];
  return title(agent) + ": " + what + ", " + seconds(box.end - box.begin) + (box.state === "ok" ? "" : ", " + WORDS[box.state])
    + (box.critical ? ", on the critical path" : "");
}

function lane(agent, place, width) {
  const line = make("li", "lane row " + agent.state), track = make("div", "track");
  const about = agent.status + ", " + count(steps(agent), "step") + (agent.again && ", " + agent.again + " again");
  const head = make("button", "", make("b", "", title(agent)), make("small", "", about));
  head.setAttribute("aria-label", title(agent) + ", " + about);
  head.setAttribute("aria-controls", "panel");
  line.append(head, track);
  facts.stages.forEach(([second, step]) => track.append(put(make("div", "rule"), (axis === "steps" ? step : second) / whole())));
  if (axis === "seconds") facts.resumed.forEach(second => track.append(put(make("div", "rule resumed"), second / whole())));
  const [first, last] = ends(agent), rows = [];
  track.append(put(make("div", "span " + agent.state), first, last));
  agent.boxes.forEach((box, number) => {
    const [begin, end] = ends(box);
    const label = (end - begin) * width > 6 * box.label.length + 5 ? box.label : "";
    const button = put(make("button", "box " + box.what + " " + box.state + (box.critical ? " critical" : ""), label), begin, end);
    let row = 0;
    if (box.what === "call") {  // beside each other where they overlap, six deep at most
      row = rows.findIndex(taken => taken <= begin + 1e-9);
      if (row < 0) row = rows.length < 6 ? rows.length : rows.indexOf(Math.min(...rows));
      rows[row] = Math.max(end, begin + 6 / width);
    }
    button.style.top = box.what === "call" ? 25 + 13 * row + "px" : "6px";
    button.dataset.box = number;
    button.dataset.step = box.step;
    button.title = tell(agent, box);
    button.setAttribute("aria-label", tell(agent, box));
    button.addEventListener("click", event => { event.stopPropagation(); show(place, box.message, true); });
    track.append(button);
  });
  track.style.height = 31 + 13 * rows.length + "px";
  if (place) track.append(put(make("span", "end", MARKS[agent.state]), last));
  line.addEventListener("click", () => show(place, -1, true));
  return line;
}

function draw() {
  at("chart").style.width = 100 * at("zoom").value + "%";
  const width = at("ticks").clientWidth;
  at("lanes").replaceChildren(...facts.agents.map((agent, place) => lane(agent, place, width)));
  const about = 7 * at("zoom").value, rough = whole() / about, power = 10 ** Math.floor(Math.log10(rough));
  const tick = Math.max([1, 2, 5, 10].find(factor => factor * power >= rough) * power, axis === "steps" ? 1 : 0);
  at("ticks").replaceChildren();
  for (let value = 0; value < whole() * 0.97; value += tick)
    at("ticks").append(put(make("span", "", axis === "steps" ? count(value, "step") : +value.toPrecision(6) + " s"), value / whole()));
  for (const name of ["seconds", "steps"]) at("axis-" + name).setAttribute("aria-pressed", name === axis);
  mark();
  thread();
  rove(at("lanes"));
}

// The critical path through the middles of its boxes.
function thread() {
  const box = at("thread").getBoundingClientRect();
  let line = "";
  for (const [place, step] of facts.path) {
    const found = at("lanes").children[place].querySelector('.answer[data-step="' + step + '"]').getBoundingClientRect();
    const y = found.top + found.height / 2 - box.top, left = found.left - box.left;
    line += line ? "H" + left + "V" + y + "H" + (left + found.width) : "M" + left + " " + y + "H" + (left + found.width);
  }
  at("thread").setAttribute("viewBox", "0 0 " + box.width + " " + box.height);
  at("thread").firstElementChild.setAttribute("d", line || "M0 0");
}

// One button of a list takes part in the order of Tab, arrows go on from there.
function rove(list) {
  const buttons = [...list.querySelectorAll("button")];
  buttons.forEach((button, number) => { button.tabIndex = number ? -1 : 0; });
}
function arrows(list) {
  list.addEventListener("focusin", event => {
    list.querySelectorAll('[tabindex="0"]').forEach(button => { button.tabIndex = -1; });
    event.target.tabIndex = 0;
  });
  list.addEventListener("keydown", event => {
    const row = event.target.closest(".row"), inside = [...row.querySelectorAll("button")], number = inside.indexOf(event.target);
    const first = line => line && line.querySelector("button");
    const next = {ArrowRight: inside[number + 1], ArrowLeft: inside[number - 1], Home: inside[0], End: inside[inside.length - 1],
      ArrowDown: first(row.nextElementSibling), ArrowUp: first(row.previousElementSibling)}[event.key];
    if (next) { event.preventDefault(); next.focus(); }
  });
}

function path() {
  at("path-length").textContent = count(facts.path.length, "step");
  facts.path.forEach(([place, step, name], number) => {
    const button = make("button", "", name), answers = facts.agents[place].boxes.filter(box => box.what === "answer");
    button.addEventListener("click", () => show(place, answers[step].message, true));
    at("path").append(number ? " → " : "", button);
  });
  rove(at("path"));
}

function asked([name, raw]) {
  const part = make("div", "asked", make("b", "", name));
  let given = null;
  try { given = JSON.parse(raw); } catch { /* shown as it is */ }
  if (given && typeof given === "object")
    for (const [key, value] of Object.entries(given))
      part.append(make("pre", "", key + ": " + (typeof value === "string" ? value : JSON.stringify(value))));
  else part.append(make("pre", "", raw));
  return part;
}

function article(message, number) {
  const state = message.state || "ok", part = make("article", message.role + " " + state + (message.critical ? " critical" : ""));
  const head = {system: "system", user: "user", assistant: "answer " + message.step, tool: "result of " + message.call}[message.role];
  part.append(make("h3", "", head, message.child && make("span", "", "subtask " + message.child),
    message.seconds == null ? "" : make("span", "", seconds(message.seconds)),
    state !== "ok" && make("span", "word", MARKS[state] + " " + WORDS[state]), message.critical && make("span", "critical", "on the critical path")));
  if (message.reasoning) {
    const thought = make("details", "", make("summary", "", "reasoning"), make("pre", "", message.reasoning));
    thought.open = true;
    part.append(thought);
  }
  if (message.text) part.append(make("pre", "", message.text));
  (message.calls || []).forEach(call => part.append(asked(call)));
  (message.errors || []).forEach(error => part.append(make("p", "word", error)));
  if (number === 0 && !message.text) part.append(make("p", "soft", "not in the log"));
  return part;
}

function show(place, message, focus) {
  const agent = facts.agents[place], back = make("button", "", "to its lane");
  chosen = place;
  here = message;
  back.addEventListener("click", () => at("lanes").children[chosen].querySelector("button").focus());
  const about = [count(steps(agent), "step"), seconds(agent.end - agent.begin), agent.size + " characters of context",
    agent.again && "the task of " + agent.again + " again", agent.why].filter(Boolean).join(" · ");
  const parts = agent.messages.map(article);
  at("panel").replaceChildren(make("header", "", make("h2", "", title(agent)), back),
    make("p", agent.state, make("span", "word", MARKS[agent.state] + " " + agent.status), make("span", "soft", " · " + about)), ...parts);
  if (agent.told) {
    const told = make("article", "told " + agent.state, make("h3", "", "what main was told"), make("pre", "", agent.told));
    at("panel").append(told);
  }
  mark();
  if (!focus) return;
  const part = parts[message];
  at("panel").focus({preventScroll: true});
  if (part) part.classList.add("here");
  if (matchMedia("(min-width: 75rem)").matches) {  // beside the lanes, else below them
    at("panel").scrollTop = part ? part.offsetTop - 12 : 0;
    at("lanes").children[place].scrollIntoView({block: "nearest"});
  } else (part || at("panel")).scrollIntoView({block: "start"});
}

function mark() {
  [...at("lanes").children].forEach((line, place) => {
    line.classList.toggle("chosen", place === chosen);
    line.firstElementChild.setAttribute("aria-expanded", place === chosen);
    line.querySelectorAll(".box").forEach(button =>
      button.classList.toggle("here", place === chosen && here >= 0 && facts.agents[place].boxes[button.dataset.box].message === here));
  });
}

for (const name of ["seconds", "steps"]) at("axis-" + name).addEventListener("click", () => { axis = name; draw(); });
at("zoom").addEventListener("input", draw);
at("panel").addEventListener("keydown", event => { if (event.key === "Escape") at("lanes").children[chosen].querySelector("button").focus(); });
addEventListener("resize", draw);
header();
path();
show(0, -1, false);
arrows(at("lanes"));
arrows(at("path"));
draw();
"""

PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Agent Swarm</title>
<style>$style</style>
</head>
<body>
<header>
<h1 id="question"></h1>
<p id="status"></p>
<pre id="answer" aria-label="answer"></pre>
<dl id="figures"></dl>
<details><summary id="models"></summary><dl id="limits"></dl></details>
</header>
<noscript><p>This page needs its script; it is in this file, and nothing is loaded.</p></noscript>
<main>
<section>
<h2>Critical path, <span id="path-length"></span></h2>
<p id="path" class="row"></p>
<h2>Timeline</h2>
<div class="controls">
<span class="switch" role="group" aria-label="axis">
<button id="axis-seconds">seconds</button><button id="axis-steps">critical steps</button></span>
<label>zoom <input id="zoom" type="range" min="1" max="20" step="0.5" value="1"></label>
<span class="soft">↑ ↓ between lanes, ← → between boxes, Enter opens</span>
</div>
<p class="legend" aria-hidden="true">
<span><i class="box critical"></i>answer on the critical path</span><span><i class="box"></i>answer</span>
<span><i class="box call"></i>tool call</span><span><i class="box refused"></i>refused</span><span><i class="box failed"></i>failed</span>
<span class="failed"><i class="span failed"></i>✕ failed subtask</span>
<span class="cut"><i class="span cut"></i>⊣ cut off at a limit</span><span class="open"><i class="span open"></i>… not ended</span>
</p>
<div class="scroller"><div id="chart">
<div id="ticks" aria-hidden="true"></div>
<ul id="lanes"></ul>
<svg id="thread" preserveAspectRatio="none" aria-hidden="true"><path></path></svg>
</div></div>
</section>
<section id="panel" tabindex="-1" aria-label="an agent's context"></section>
</main>
<script type="application/json" id="facts">$facts</script>
<script>$script</script>
</body>
</html>
""")


def _hash(text):
    """A content security policy's source for an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def trace(events, rewards=None):
    """The page, str; arguments as of `facts`. Raises LogError."""
    told = json.dumps(facts(events, rewards), allow_nan=False).replace("<", "\\u003c")
    policy = f"default-src 'none'; script-src {_hash(SCRIPT)}; style-src {_hash(STYLE)}; base-uri 'none'; form-action 'none'"
    return PAGE.substitute(policy=policy, style=STYLE, facts=told, script=SCRIPT)
