"""The report of dep_bench.py: its figures as Markdown and as plots. All of it is read off what dep_bench.json holds.

Public names: ENCODERS, KINDS, WAYS, HOW, disagreement, quantile, peaks, table, markdown, figure_of, plot_efficiency, plot_memory, plot_imbalance.
Letters: none.     Tests: pytest tests/test_dep_bench.py
"""

import contextlib
import itertools
import math

ENCODERS, KINDS = ("dep", "stage0"), ("text", "multimodal")
WAYS = {"raw": "(a) raw", "discounted": "(b) discounted", "by_flops": "(c) by operations"}
HOW = ("dep", "contiguous", "stage0")  # who encodes an item


def disagreement(layouts):
    """Largest relative difference of the encoders' losses on the first batch: they compute the same."""
    losses = {(at, s["encoder"], s["kind"]): s["loss"] for at, layout in enumerate(layouts) for s in layout["samples"] if s["batch"] < 0}
    return max(abs(loss / losses[at, "dep", kind] - 1) for (at, _, kind), loss in losses.items())


def quantile(values, share):
    """The least value that `share` of the values do not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


CURVES = (("dep", "text"), ("dep", "multimodal"), ("stage0", "multimodal"))


def peaks(layout, encoder, kind):
    """[(step, MB)]: the peak of the first stage's fullest rank at each memory step."""
    mine = [step for step in layout["memory"] if (step["encoder"], step["kind"]) == (encoder, kind)]
    return [(step["batch"], max(step["ranks"][: layout["dp"]]) / 1e6) for step in mine]


WORDS = """\
# DEP beside an encoder on the first stage

    {command}

{device}, {cores} cores, load {load:.1f} at the end, torch {torch}, Python {python}; {ranks} processes, {dtype}, ZeRO-1, seed {seed}.
Medians over {repeats} batches, quartiles in brackets; the four sides of a batch run in turn.

Model: preset toy with {layers} layers, 8 experts and a tower of 2 layers: {parameters:,} parameters. A step has
{global_microbatches} microbatches of {rows} × {length} tokens, every row full, with pictures or without.

Pictures: {text_only:.0%} of the rows have none, the others n = 1 … {most} with probability ∝ n^−{power:g}, as far as they fit.
Embeddings of a picture: log-normal, median {median:g}, σ {sigma:g}, at most {largest}; its height / width: log-normal, σ {aspect:g}.
Drawn were {vision_tokens:.1%} of the tokens as pictures, up to {microbatch_most:.0%} of a microbatch; {rows_text_only:.0%} of the
rows are text only; {items_per_step} pictures in a step, of {patches_per_item} patches (least, median, most).

The encoder's forward pass is {share:.1%} of the backbone's operations. K2.5's is {share_k25:.1%}: 10 % vision tokens, pictures of
1,024 patches. Of an average rank's share of the backbone that is {of_rank}, and {of_rank_k25:.0%} of K2.5 (pp 16).

## Step time and efficiency

E: seconds of the encoder's own forward, recompute (DEP) and backward passes, of all ranks together.

- (a) raw = text-only / multimodal
- (b) discounted = text-only / (multimodal − E / workers): what a perfectly even encoder would take is taken off
- (c) by operations = text-only · (1 + encoder's operations / backbone's) / multimodal: as (b), but the encoder, recompute
  included, would have to be as fast as the backbone

One core per rank ({workers_core} workers): {core_words}
Wall clock ({workers_wall} workers): {wall_words}

Layers of the first rank and of the fullest: {of_layers}. Where the first has fewer, an encoder
there works in the gap for free; with pp 16 and two virtual stages K2.5's have 3 and 4. --layers 15 closes the gap of pp 4.

{times}
To show: DEP at 90 % or more by (b), {judged}. Found: {worst:.1%} in the worse layout{missed}.
Both encoders computed the same losses: largest relative difference on the first batch {disagreement:.0e}.

![Step time and efficiency](efficiency.png)

## Peak memory of the first stage

The most that is allocated at any time beyond what stands when the step begins, MB (10⁶ bytes), on the fullest rank of the first
stage, by {counter}; {memory_steps} further batches.

{memory}
![Peak memory of the first stage by step](memory.png)

## Imbalance

Largest / mean patches per rank, {ranks} ranks; median and worst of the {steps} batches above:

{steps_table}
{draws} random batches for each number of items per rank, without a model (median, 99 % within, worst):

{items_table}
To show: at most 1.05 from 16 items per rank on. Found: {most_uneven:.3f} at worst{missed_even}.

![Imbalance by items per rank](imbalance.png)
"""
CORE = {"cpu": "put together from the ranks' own processor time for every pass, the schedule's\ntables, and the slowest rank in each "
               "phase around the pipeline. Messages cost what copying them costs.",
        "cuda": "the same put together from each device's time for every pass and phase, with synchronisation."}  # fmt: skip
WALL = {"cpu": "the true one; with fewer cores than ranks it hides the waiting for a slow stage.", "cuda": "the true one."}


def table(head, rows):
    """A Markdown table of lists of strings."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def markdown(result):
    """The report as text: every number of it is in the JSON, or follows from it."""
    settings, model, layouts = result["settings"], result["model"], result["layouts"]
    device, workers, clocks = settings["device"], result["workers"], {"core": "one core per rank", "wall": "wall clock"}
    times, memory, uneven = [], [], []
    for layout in layouts:
        name, steps = f"pp {layout['pp']} · dp {layout['dp']}", list(layout["imbalance"].values())
        for clock, encoder in itertools.product(clocks, ENCODERS):
            f, spent = layout["figures"][encoder][clock], layout["figures"][encoder]["encoder"][0]
            times.append([name, clocks[clock], encoder, *("{:.3f} ({:.3f} … {:.3f})".format(*f[kind]) for kind in KINDS), f"{spent:.3f}",
                          *("{:.1%} ({:.1%} … {:.1%})".format(*f[way]) for way in WAYS)])  # fmt: skip
        text, ours, first = ([peak for _, peak in peaks(layout, *curve)] for curve in CURVES)
        spans = [f"{min(curve):.1f} … {max(curve):.1f}" for curve in (ours, first)]
        memory.append([name, f"{max(text):.1f}", *spans, f"{max(first) / max(ours):.2f}"])
        many = [step["items"] / settings["ranks"] for step in steps]
        by_step = ([step[how] for step in steps] for how in HOW)
        uneven.append([name, f"{min(many):.1f} … {max(many):.1f}", *(f"{quantile(v, 0.5):.3f}, {max(v):.3f}" for v in by_step)])
    items = [[str(number), *(f"{quantile(v, 0.5):.3f}, {quantile(v, 0.99):.3f}, {max(v):.3f}" for v in ways.values())]
             for number, ways in result["by_items"].items()]  # fmt: skip
    judged = "wall" if device == "cuda" else "core"
    worst = min(layout["figures"]["dep"][judged]["discounted"][0] for layout in layouts)
    most_uneven = max(max(ways["dep"]) for number, ways in result["by_items"].items() if int(number) >= 16)
    drawn_words = {key: ", ".join(f"{number:g}" for number in value) for key, value in result["drawn"].items() if isinstance(value, list)}
    return WORDS.format_map(
        settings | settings["spread"] | result["about"] | model | result["drawn"] | drawn_words
        | {"command": result["command"], "of_rank": " and ".join(f"{model['share'] * pp:.0%} (pp {pp})" for pp in settings["pp"]),
           "of_layers": ", ".join(f"{each['layers'][0]} and {max(each['layers'])} (pp {each['pp']})" for each in layouts),
           "of_rank_k25": 16 * model["share_k25"], "workers_core": workers["core"], "workers_wall": workers["wall"],
           "core_words": CORE[device], "wall_words": WALL[device], "judged": clocks[judged], "worst": worst,
           "missed": "" if worst >= 0.9 else " — missed", "disagreement": disagreement(layouts),
           "counter": "the CUDA allocator" if device == "cuda" else "torch's profiler, which sees every allocation",
           "steps": len(layouts[0]["imbalance"]), "most_uneven": most_uneven, "missed_even": "" if most_uneven <= 1.05 else " — missed",
           "times": table(["layout", "counted by", "encoder", "text-only, s", "multimodal, s", "E, s", *WAYS.values()], times),
           "memory": table(["layout", "text-only", "dep, least … most", "stage0, least … most", "stage0's most / dep's"], memory),
           "steps_table": table(["layout", "items per rank", *HOW], uneven),
           "items_table": table(["items per rank", "dep", "contiguous"], items)})  # fmt: skip


# ----------------------------------------------------------------------------------------------- plots

COLOURS = {"dep": "#3366aa", "stage0": "#dd7722", "contiguous": "#999999"}


@contextlib.contextmanager
def figure_of(path, rows, columns, size):
    """Yields panels (rows,columns), and writes the picture when done."""
    from report import plt, save_figure  # here: matplotlib loads slowly

    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    yield panels
    save_figure(figure, path)


def plot_efficiency(result, path):
    """Step times of both kinds of batches above, efficiency by all ways of counting below; a column per layout."""
    layouts = result["layouts"]
    with figure_of(path, 2, len(layouts), (5 * len(layouts), 7)) as panels:
        for (above, below), layout in zip(panels.T, layouts):
            for at, encoder in enumerate(ENCODERS):
                figures_of, colour = layout["figures"][encoder], COLOURS[encoder]
                for shift, kind, words in ((-0.2, "text", "text-only"), (0.2, "multimodal", "multimodal")):
                    median, low, high = figures_of["core"][kind]
                    above.bar(at + shift, median, 0.36, yerr=[[median - low], [high - median]], capsize=4, color=colour,
                              alpha=0.45 if kind == "text" else 1)  # fmt: skip
                    above.text(at + shift, high, f"{words}\n{median:.3f} s", ha="center", va="bottom", fontsize=8)
                shown = (("core", "one core per rank", "o", 0, 1), ("wall", "wall clock", "x", 0.12, 0.4))
                for clock, words, marker, shift, alpha in shown:
                    median, low, high = zip(*([100 * value for value in figures_of[clock][way]] for way in WAYS))
                    places = [place + 0.4 * at - 0.25 + shift for place in range(len(WAYS))]
                    spread = [[m - q for m, q in zip(median, low)], [q - m for m, q in zip(median, high)]]
                    below.errorbar(places, median, spread, fmt=marker, color=colour, capsize=3, alpha=alpha, label=f"{encoder}, {words}")
                    for x, y in zip(places, median) if clock == "core" else ():
                        below.annotate(f"{y:.0f}", (x, y), (-5, 0), textcoords="offset points", ha="right", va="center", fontsize=8)
            above.set(title=f"pp {layout['pp']} · dp {layout['dp']}", ylabel="seconds of a step, one core per rank")
            above.set_xticks(range(len(ENCODERS)), ENCODERS)
            above.margins(y=0.2)
            for level, style in ((90, "--"), (100, "-")):
                below.axhline(level, color="black", linewidth=0.8, linestyle=style)
            below.set(xlim=(-0.5, len(WAYS) - 0.5), ylabel="% of text-only efficiency")
            below.set_xticks(range(len(WAYS)), WAYS.values())
            below.grid(axis="y", alpha=0.3)
        panels[0, 0].figure.legend(*panels[1, 0].get_legend_handles_labels(), loc="outside lower center", ncol=4, fontsize=8)


def plot_memory(result, path):
    """The first stage's peak at each step, a panel per layout."""
    layouts = result["layouts"]
    with figure_of(path, 1, len(layouts), (5 * len(layouts), 4)) as panels:
        for panel, layout in zip(panels[0], layouts):
            for encoder, kind in CURVES[1:]:
                panel.plot(*zip(*peaks(layout, encoder, kind)), "o-", color=COLOURS[encoder], label=f"{encoder}, multimodal")
            for _, peak in peaks(layout, *CURVES[0]):
                panel.axhline(peak, color="black", linestyle="--", linewidth=1, label="text-only")
            panel.set(title=f"pp {layout['pp']} · dp {layout['dp']}", xlabel="step", ylabel="peak of the first stage, MB")
            panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3)
            panel.legend(loc="lower right")


def plot_imbalance(result, path):
    """Imbalance by items per rank: median, and the band that holds all but the outermost hundredths."""
    ranks, numbers = result["settings"]["ranks"], [int(number) for number in result["by_items"]]
    with figure_of(path, 1, 1, (7, 4.5)) as ((panel,),):
        for how in ("contiguous", "dep"):
            low, median, high = ([quantile(ways[how], share) for ways in result["by_items"].values()] for share in (0.01, 0.5, 0.99))
            panel.plot(numbers, median, "o-", color=COLOURS[how], label=f"{how}: median, 1 … 99 %")
            panel.fill_between(numbers, low, high, color=COLOURS[how], alpha=0.2)
        steps = [(step["items"] / ranks, step["dep"]) for step in result["layouts"][0]["imbalance"].values() if step["items"]]
        panel.plot(*zip(*steps), "x", color="black", label="dep, the steps of this run")
        panel.axhline(ranks, color=COLOURS["stage0"], linestyle=":", label="stage0 without replicas: one rank encodes all")
        panel.axhline(1.05, color="black", linewidth=1, linestyle="--", label="1.05")
        panel.set(xscale="log", yscale="log", xlabel="items per rank", ylabel="largest / mean patches per rank")
        panel.set_xticks(numbers, map(str, numbers))
        ticks = [tick for tick in (1, 1.05, 1.2, 1.5, 2, 3, 4, 8) if tick <= ranks]
        panel.set_yticks(ticks, map(str, ticks))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.93))
