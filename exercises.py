"""The exercises in teaching order, their stubs and their worked solutions, both made from the live source.

A stub is the signature and docstring of each op's reference, without the body; a solution is the reference with all
that it calls, gathered from its modules into one file. Neither is stored anywhere, so neither goes stale.

Public names: ROOT, Exercise, EXERCISES, ExerciseError, find_exercise, stub, solution.
Tests: pytest tests/test_classroom.py
"""

import ast
import difflib
import functools
import inspect
import pathlib
import re
import textwrap
from dataclasses import dataclass

from conformance import OPS

ROOT = pathlib.Path(__file__).resolve().parent


class ExerciseError(ValueError):
    """An exercise that does not exist; one line names the nearest."""


# The exercises


@dataclass(frozen=True)
class Exercise:
    """One lesson: some ops to write, in the order of teaching."""

    name: str
    title: str
    ops: tuple[str, ...]
    minutes: int
    learn: str  # what one can do afterwards
    why: str  # one sentence
    hints: tuple[str, str, str]  # from coarse to fine


EXERCISES = (
    Exercise(
        "rms_norm", "RMSNorm", ("rms_norm",), 15,
        "Normalise by the root mean square, in the right precision, with eps in the right place.",
        "Every layer uses it twice, so that one small error here is repeated 122 times.",
        ("Compare with LayerNorm: what is left out?",
         "In bfloat16 the mean of squares must be taken in float32; the result has the dtype of x.",
         "eps stands under the root, and the weight multiplies after the result has gone back to the dtype of x."),
    ),
    Exercise(
        "rope", "Rotary positions in both layouts", ("rope", "rope_half_split", "rope_permutation"), 35,
        "Turn pairs of numbers by an angle, and move weights between the two layouts in the field.",
        "To mix them up is among the commonest mistakes of ports: every shape is right and no number is.",
        ("A rotation keeps lengths: is |rope(x)| = |x| for every pair?",
         "Adjacent pairs are x[..., 0::2] and x[..., 1::2]; half-split pairs are the two halves of the last dimension.",
         "(a, b) becomes (a cos − b sin, a sin + b cos); cos and sin need a head dimension; the permutation lists "
         "first all even places, then all odd ones."),
    ),
    Exercise(
        "yarn", "YaRN: a longer context from the same weights", ("yarn_frequencies", "rope_table", "softmax_scale"), 50,
        "Blend two sets of frequencies by a ramp, and know which of the two mscales enters where.",
        "The softmax scale of K2.5 is 0.144680 and not 192^-1/2; most missing factors hide at position 0.",
        ("Check factor 1 first: everything must then be plain RoPE.",
         "The ramp runs over indices of pairs, between the floor of one index and the ceiling of another, both kept in "
         "range; fast pairs keep their frequency, slow ones are divided by the factor.",
         "cos and sin are scaled by mscale(f, mscale) / mscale(f, mscale_all_dim); the softmax scale by "
         "mscale(f, mscale_all_dim) squared. Compute angles in float64 and round once."),
    ),
    Exercise(
        "mla", "Multi-head latent attention", ("visibility", "mla_attention"), 60,
        "Expand keys and values of all heads from one small latent, and mask packed sequences.",
        "The latent is what makes a cache of 262,144 tokens affordable.",
        ("Begin with one head and one token: the softmax is then 1 and the output is the value.",
         "The rows of kv_b belong to heads: first N rows of keys, then V rows of values, for each head in turn.",
         "logits = (q_nope · k_nope + q_rope · rope_key) · scale with rope_key shared by the heads; queries are the "
         "last T of the S keys; softmax over S."),
    ),
    Exercise(
        "decode", "Decoding from the latent cache", ("mla_decode", "cache_update"), 45,
        "Absorb the expansion into query and output, so that keys and values never exist.",
        "A decode step is limited by memory: this reads 576 numbers per token instead of 20,480.",
        ("It is the same function as mla_attention: any right answer is accepted, then try to avoid the expansion.",
         "q · (K c) = (Kᵀ q) · c: move the key half of kv_b to the query and the value half behind the softmax.",
         "Write at `length`, return only the first length + T entries: what lies beyond holds NaN and must not be "
         "read, not even multiplied by 0. Leave the given cache as it is: copy it."),
    ),
    Exercise(
        "router", "The router", ("route",), 50,
        "Choose experts by biased scores and weigh them by unbiased ones.",
        "A bias that leaks into the weights trains a different model, silently.",
        ("Selection and weights are two different things: which of them may see the bias?",
         "Groups are scored by the sum of their two best biased scores; dropped groups are −inf, not 0; the lower "
         "index wins a tie.",
         "Scores are sigmoid in float32. weights = scale · s[chosen] / Σ s[chosen], from the unbiased s; a pinned "
         "choice replaces the selection alone, and gradients still flow through s."),
    ),
    Exercise(
        "moe", "SwiGLU and the routed experts", ("swiglu", "experts"), 35,
        "Gate a feed-forward layer and send each token through its own K of E experts.",
        "Ninety-nine of every hundred parameters of the model live here.",
        ("Write the loop over experts first; speed comes later.",
         "silu stands on the gate and not on up; each token's result is the weighted sum over its K experts.",
         "An expert that nobody chose still needs a gradient (zero), and one that two tokens chose adds up: "
         "index_add, not assignment."),
    ),
    Exercise(
        "balance", "Balancing without an auxiliary loss", ("load_counts", "balance_bias", "balance_loss"), 40,
        "Count loads as integers, nudge the bias by a sign, and add the small sequence-wise loss.",
        "Without balancing a few experts get everything; with too much of it the router learns nothing.",
        ("Which tokens count? Padding does not.",
         "The bias moves by γ · sign(mean load − load): up for an expert that gets too little, not at all at the mean.",
         "The loss is per sequence: the share of its choices, times E, times the mean normalised score, summed over "
         "experts and averaged over the sequences that have a valid token; only the scores carry a gradient."),
    ),
    Exercise(
        "int4", "int4 weights", ("int4_pack", "int4_unpack", "fake_quant", "int4_linear"), 60,
        "Quantise in groups of 32, pack eight codes into a word, and train through the rounding.",
        "The released experts are int4: with nibbles in the wrong order a trillion parameters are noise.",
        ("Does unpacking what you packed and packing it again give every code back?",
         "Is it max|w| / 7.5 or / 7? Requantising tells. The scale is rounded to bfloat16 before it divides.",
         "Code q + 8 sits in bits 4i … 4i+3 of its word, lowest first; fake_quant equals unpack(pack(w)) bitwise and "
         "passes the gradient straight through."),
    ),
    Exercise(
        "patches", "From pixels to patches", ("resize_plan", "patchify", "patch_embed"), 45,
        "Plan a size, pad it, cut it into patches and embed them with one matrix.",
        "A transposed patch still looks like an image to every shape check.",
        ("Check one patch whose three channels differ, and a picture that is not square.",
         "Never upscale; limits count patches; padding goes right and below, to multiples of two patches.",
         "The order inside a patch is channel, row, column, and patches run along rows; the convolution is then "
         "x @ weight.flatten(1).T + bias."),
    ),
    Exercise(
        "vit", "Attention for images and clips", ("position_embedding", "rope_2d", "vit_attention"), 75,
        "Give patches of any picture size a place, and keep packed items apart.",
        "One set of weights serves images and clips; only positions and packing tell them apart.",
        ("Try one item first, then two items of different sizes.",
         "The sinusoid over time is added only when t > 1; the 2-D angles are those of one frame, repeated t times; "
         "attention never crosses an item.",
         "Interpolate bicubically, align_corners false, and not at all at the table's own size; rotary pairs "
         "alternate column, row, column, row and turn adjacent numbers."),
    ),
    Exercise(
        "projector", "Pooling, projector and splice", ("pool_merge", "project", "media_tokens", "media_splice"), 50,
        "Shrink a clip to the tokens that the language model reads, and put them in their places.",
        "The number of placeholders and of embeddings must agree whatever t is, or everything after is shifted.",
        ("How many tokens has a clip of t frames? As many as an image of its size.",
         "Mean over frames first, then 2×2 neighbours, rows before columns; the norm is per patch, before the four "
         "are joined.",
         "GELU is the exact one (erf); the k-th media place of the flattened batch takes the k-th media token, and "
         "gradients flow into both the text and the media embeddings."),
    ),
    Exercise(
        "cross_entropy", "Cross-entropy from hidden states", ("cross_entropy",), 30,
        "Compute the loss of each token without overflowing, and without keeping all logits if you can.",
        "At 163,840 words the logits of one batch are the largest tensor of the whole training step.",
        ("Large logits must not give inf: is the maximum taken off?",
         "loss = logsumexp(logits) − logit of the target, in at least float32; target −100 means no loss.",
         "Where the target is −100 the loss and its gradients are exactly zero; gather needs a valid index there all the "
         "same."),
    ),
    Exercise(
        "muonclip", "MuonClip", ("newton_schulz", "muon_update", "adamw_update", "max_logits", "qk_clip"), 80,
        "Orthogonalise a momentum, scale the step, and rein in attention logits head by head.",
        "Kimi K2 was trained on 15.5 T tokens without one loss spike with this optimizer.",
        ("Which matrices are tall? Newton–Schulz works on the smaller side.",
         "Divide by the Frobenius norm first; the step is lr · 0.2 · √max(rows, columns); weight decay multiplies the "
         "old weight by 1 − lr · decay.",
         "QK-Clip: γ = min(1, τ / max logit) per head; q_nope and k_nope take √γ, q_rope takes γ, values and the "
         "shared rope key take nothing."),
    ),
    Exercise(
        "video", "Frames and timestamps", ("frame_indices", "timestamp"), 25,
        "Choose frames at two per second and write their times the way the prompt does.",
        "All decoded frames of a clip at 30 fps cost fifteen times as much, and look right.",
        ("30 fps for 4 seconds at 2 fps gives 8 frames: does yours?",
         "A source slower than the sampling rate keeps all its frames; the chosen ones are evenly spaced from the first "
         "to the last.",
         "hh:mm:ss.fff: hours may pass 24, and milliseconds are cut, not rounded, as in the released processor."),
    ),
    Exercise(
        "template", "Chat template and tool calls", ("render", "parse"), 90,
        "Write a conversation as the model reads it, and read tool calls back, malformed ones included.",
        "A server with a wrong template looks like a worse model, and no number anywhere is wrong.",
        ("Render one user message first; then add a tool call, then thinking.",
         "Tool-call ids are functions.NAME:INDEX, and the index runs through the whole conversation.",
         "Parse without greedy patterns: each call ends at its own end marker; an answer in instant mode is content "
         "and not reasoning; a malformed call is counted and does not stop the rest."),
    ),
    Exercise(
        "rewards", "Rewards that can be checked", ("count_score", "ocr_score", "box_f1", "point_f1", "polygon_iou"), 75,
        "Turn what a model wrote about a picture into a number between 0 and 1 that cannot be talked up.",
        "Whatever a reward overlooks is what reinforcement learning will find.",
        ("Ask of each reward: what answer gets a high score without being right?",
         "Both ends of a box belong to it; nothing predicted where nothing is scores 1; the edit distance is divided by the "
         "longer text.",
         "scipy.optimize.linear_sum_assignment finds the pairs with the largest sum (maximize=True); set the rows of copies "
         "beyond those in the truth to 0 before. A cell of a polygon: an edge through its middle, or an odd number of "
         "crossings to its right."),
    ),
    Exercise(
        "objective", "The policy objective", ("token_logprobs", "group_advantages", "mismatch_weights", "policy_objective"), 90,
        "Write the loss of K2.5's reinforcement learning so that its gradient, not only its value, is right.",
        "Of the mistakes collected here nearly all train, only worse: no error is raised and the reward goes up for a while.",
        ("Work one batch by hand: two responses of unequal length to one prompt. What is N?",
         "Logits at position t are about token t + 1, and the temperature divides them; invalid responses enter neither mean "
         "nor sums; what is no generated token may be NaN, and NaN times 0 is NaN.",
         "torch.where(inside, clamp(log ρ).exp(), clamp(log ρ).exp().detach()) has the value of the clipped ratio and the "
         "gradient of the mask; inside asks both log-ratios. The squared term stands outside of all that, without ½."),
    ),
    Exercise(
        "toggle", "Toggle, and what to learn from", ("toggle_budgets", "toggle_rewards", "rft_select"), 40,
        "Save tokens where the answers are already right, and leave hard prompts the room they need.",
        "A rigid budget teaches short answers, and the model cannot use more compute later.",
        ("Which responses lose their reward? Only long ones, only of prompts that are solved well, only in every other phase.",
         "The budget binds where the mean is λ or more: < is strict there, and ≤ includes a response of just the budget.",
         "phase = iteration // period % 2, and the budget binds in phase 0. A prompt without a correct response has the budget "
         "∞. For fine-tuning sort by (−reward, length, index), then skip what is full or already taken."),
    ),
    Exercise(
        "critical_steps", "Critical steps", ("critical_steps",), 20,
        "Measure the time of work side by side in steps of a model, not in seconds and not in work.",
        "It is the budget of a swarm: one main step with three subtasks of ten steps costs 11 and not 31.",
        ("Work the example by hand, then one with two stages: does yours wait after the first of them?",
         "A maximum per stage, a sum over the stages; the orchestrator waits for its subagents and does not work beside them.",
         "Which subtasks count? All that were given, also those that failed, and nothing else: elsewhere steps may hold anything. "
         "The maximum of a stage without subtasks is 0, and its own steps still count."),
    ),
    Exercise(
        "parl", "The reward of an orchestrator", ("item_f1", "parl_reward"), 60,
        "Pay for parallel work and for finished work early in training, and for the answer alone in the end.",
        "Each part can be gamed: by nothing given away, by the same thing given away twice, by an answer nobody judged.",
        ("What does an agent earn that gives nothing away, or the same subtask four times? What becomes of NaN?",
         "Both parts count different subtasks only: r_parallel those of the widest stage, r_finish those that were finished, divided "
         "by all that were given, repetitions included.",
         "Go through the stages with the set of prompts that were finished before: different are a stage's prompts less that set, and "
         "earned are its finished prompts less that set. λ1 and λ2 are straight between two knots and constant beyond the ends; the "
         "performance has the weight 1, and stays NaN when it is."),
    ),
    Exercise(
        "swarm", "Which tokens of a swarm learn", ("swarm_advantages",), 30,
        "Give an episode's advantage to the tokens that the orchestrator sampled, and to no others.",
        "A mask that is too wide trains the orchestrator to imitate its tools and its subagents, and no error is raised.",
        ("For one episode write down who wrote each token, and in whose context it stands. Which were sampled by the model in training?",
         "Two conditions: written by the orchestrator and standing in its own context. What a subagent returns fails the first, a "
         "prompt that was given away fails the second where it stands in the subagent's context.",
         "advantage = reward less the mean over the valid episodes of the same prompt, each counted once however many agents it has; "
         "torch.where and not a product, because the reward of an invalid episode may be NaN. N counts trained tokens of valid episodes."),
    ),
)  # fmt: skip


def find_exercise(name):
    """The Exercise of that name. Raises ExerciseError with the nearest name."""
    for found in EXERCISES:
        if found.name == name:
            return found
    near = difflib.get_close_matches(name, [e.name for e in EXERCISES], 1)
    hint = f"did you mean {near[0]}?" if near else "see python oracle.py exercise --list"
    raise ExerciseError(f"no exercise named {name!r}: {hint}")


# Stubs and solutions, from the live source


def stub(exercise, filename="my_file.py"):
    """The text of a file to fill in: signatures and docstrings of the exercise's ops, no bodies."""
    references = [OPS[name].reference for name in exercise.ops]
    modules = dict.fromkeys(reference.__module__ for reference in references)
    letters = [_letters(_source(name)[0]) for name in modules]
    number = EXERCISES.index(exercise) + 1
    lines = [
        f'"""Exercise {number} of {len(EXERCISES)}: {exercise.title} (about {exercise.minutes} minutes).', "",
        f"{exercise.learn}", f"{exercise.why}", "",
        f"Grade this file:      python oracle.py grade {filename} --hints 1        (or 2, or 3)",
        f"A worked solution:    python oracle.py exercise {exercise.name} --solution",
        *[f"\n{line}" for line in dict.fromkeys(letters) if line], '"""', "",
        "from __future__ import annotations", "", "import math", "", "import torch", "import torch.nn.functional as F",
        "", f'EXERCISE = "{exercise.name}"',
    ]  # fmt: skip
    for name, reference in zip(exercise.ops, references):
        node = _source(reference.__module__)[1][reference.__name__]
        doc = inspect.getdoc(reference) or OPS[name].formula
        doc = "\n".join(f"    {line}" if line else "" for line in doc.splitlines())
        lines += ["", "", f"def {name}({ast.unparse(node.args)}):", f'    """{doc.lstrip()}', '    """',
                  f'    raise NotImplementedError("write {name}")']  # fmt: skip
    return "\n".join(lines) + "\n"


def _letters(text):
    """The legend of dimension letters in a module's docstring, one line."""
    doc = ast.get_docstring(ast.parse(text)) or ""
    found = re.search(r"^Letters: .*?(?=\.\s|\n\n|\Z)", doc, re.DOTALL | re.MULTILINE)
    return textwrap.fill(" ".join(found.group().split()) + ".", 116) if found else ""


@functools.cache
def _source(module):
    """The text of one of the project's modules and its top-level bindings, name → statement or (import, alias)."""
    text, bindings = (ROOT / f"{module}.py").read_text(encoding="utf-8"), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bindings[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bindings |= {alias.asname or alias.name.partition(".")[0]: (node, alias) for alias in node.names}
        else:
            stored = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
            bindings |= dict.fromkeys(stored, node)
    return text, bindings


def _is_ours(name):
    return name is not None and (ROOT / f"{name}.py").is_file()


class _Collector:
    """Gathers functions with all that they use of the project into one file, dependencies first."""

    def __init__(self, names):
        self.names = names  # (module, name) → the name it gets in the file
        self.imports, self.chunks, self.done = {}, [], set()

    def collect(self, module, name):
        """Add one top-level name of a module; returns what it is called in the file."""
        node = _source(module)[1][name]
        if isinstance(node, tuple):
            statement, alias = node
            if isinstance(statement, ast.ImportFrom) and _is_ours(statement.module):
                return self.collect(statement.module, alias.name)
            line = ast.unparse(type(statement)(**dict(ast.iter_fields(statement)) | {"names": [alias]}))
            self.imports[line] = None
            return name
        taken = set(self.names.values())
        new = self.names.setdefault((module, name), f"_{module}_{name}" if name in taken else name)
        if (module, node.lineno) not in self.done:
            self.done.add((module, node.lineno))
            self.chunks.append(self._rewrite(module, name, new, node))
        return new

    def _rewrite(self, module, name, new, node):
        """The source of a statement with the names of the new file."""
        (text, bindings), edits = _source(module), []
        local = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        if isinstance(node, ast.FunctionDef):
            local |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in bindings:
                found = bindings[part.value.id]
                if isinstance(found, tuple) and isinstance(found[0], ast.Import) and _is_ours(found[1].name):
                    edits.append((part, self.collect(found[1].name, part.attr)))
            elif isinstance(part, ast.Name) and part.id in bindings and part.id not in local:
                found = bindings[part.id]
                whole = isinstance(found, tuple) and isinstance(found[0], ast.Import) and _is_ours(found[1].name)
                if not whole and (called := self.collect(module, part.id)) != part.id:
                    edits.append((part, called))
        lines = [line.encode() for line in text.splitlines()]  # columns of ast count bytes
        for part, called in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
            line = lines[part.lineno - 1]
            lines[part.lineno - 1] = line[: part.col_offset] + called.encode() + line[part.end_col_offset :]
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and new != name:
            word = rb"\b" + name.encode() + rb"\b"
            lines[node.lineno - 1] = re.sub(word, new.encode(), lines[node.lineno - 1], count=1)
        begin = min([node.lineno, *[d.lineno for d in getattr(node, "decorator_list", [])]])
        return b"\n".join(lines[begin - 1 : node.end_lineno]).decode()


def solution(exercise):
    """The references of an exercise, with all that they call, as the text of one file that stands alone."""
    references = {name: OPS[name].reference for name in exercise.ops}
    collector = _Collector({(r.__module__, r.__name__): name for name, r in references.items()})
    for reference in references.values():
        collector.collect(reference.__module__, reference.__name__)
    head = [f'"""{exercise.title}: the reference."""', "", "from __future__ import annotations", "", *collector.imports,
            "", f'EXERCISE = "{exercise.name}"']  # fmt: skip
    return "\n".join(head) + "".join(f"\n\n\n{chunk}" for chunk in collector.chunks) + "\n"
