"""Golden models: tiny checkpoints in the released layout with taps and greedy answers, and their comparison.

Every format is computed in float32 from the weights as stored, so that a misread weight cannot hide behind rounding. A
program that computes in bfloat16 gets wider rules, measured on such a run of ours.

Public names: build, write_models, compare_model.
Letters: T tokens, E experts, K chosen, U vocabulary.     Tests: pytest tests/test_goldens.py
"""

import pathlib
from dataclasses import replace

import torch
import torch.nn.functional as F

from adapter import Outcome
from checkpoint import CheckpointError, load_tensors, write_file
from conformance import OPS, Record, diagnose
from golden_cases import GoldenError, Verdict, differs, form, judged, make_rule, read_json, to_json
from k25 import K25, K25Config, generate, load, save
from mla import Yarn
from op import TOLERANCE, Difference
from taps import capture, read_taps, standard_prompts, write_taps

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int4": torch.bfloat16}  # dtype of what is not packed
ROUNDING = 2  # times the reference's own error: less than for one op, since over a model errors average out
NEW_TOKENS = 12  # of a greedy answer
RIVALS = 8  # tokens told beside each of them


# Models


def build(name, seed):
    """The model of `--model`, in float32.

    name: "toy", the preset; "tiny", smaller, with YaRN and all sizes different; or the directory of a run or a
    checkpoint; seed: of the random weights. Returns K25. Raises GoldenError for another name.
    """
    if name == "tiny":
        return _random(_tiny(), seed)
    if name == "toy":
        return _random(replace(K25Config.preset("toy"), initializer_range=0.1), seed)
    directory = pathlib.Path(name)
    directory = directory / "model" if (directory / "model").is_dir() else directory
    if not (directory / "config.json").is_file():
        raise GoldenError(f"no model {name!r}: give tiny, toy, or the directory of a run or a checkpoint")
    return load(directory, dtype=torch.float32)


def _tiny():
    toy = K25Config.preset("toy")
    vision = replace(toy.vision, init_pos_emb_height=8, init_pos_emb_width=6, vt_hidden_size=32, vt_num_attention_heads=2,
                     vt_num_hidden_layers=2, vt_intermediate_size=48, mm_hidden_size=32, text_hidden_size=64)  # fmt: skip
    return replace(toy, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, q_lora_rank=24, kv_lora_rank=20,
                   qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8, initializer_range=0.15,
                   yarn=Yarn(8.0, 64), vision=vision)  # fmt: skip


def _random(config, seed):
    """Random weights by which every part of the model matters, and which decide clearly: in bf16 too."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = K25(config)
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases start at 1 and 0, where forgetting them goes unseen
                weight.add_(torch.empty_like(weight).uniform_(-0.3, 0.3))
        for router in model.routers():
            router.e_score_correction_bias.normal_(std=0.1)
        for block in model.language_model.model.layers[config.first_k_dense_replace :]:
            block.mlp.experts.down_proj.mul_(0.1)  # bf16 chooses other experts by rounding: let little depend on it
        model.language_model.lm_head.weight.mul_(3.0)  # far from ties of tokens
    return model.eval()


# Writing


def write_models(model, folder, seed):
    """Write a checkpoint in every format, with taps and greedy answers to the standard prompts, to `folder`/model.

    model: K25 in float32; int4 is left out where the experts' widths are no multiples of 32. Returns {format: entry in
    the manifest}.
    """
    config, prompts, entries = model.config, standard_prompts(model.config, seed), {}
    fits = config.hidden_size % 32 == 0 and config.moe_intermediate_size % 32 == 0
    for name, dtype in FORMATS.items():
        if name == "int4" and not fits:
            continue
        place, at = folder / "model" / name, f"model/{name}"
        save(model.to(dtype), place / "checkpoint", int4=name == "int4")
        runs = [load(place / "checkpoint", dtype=d) for d in (torch.float32, torch.bfloat16, torch.float64)]
        captured, rules, answers = {}, {}, {}
        for prompt_name, prompt in prompts.items():
            taps = capture(runs[0], prompt)
            routing = {n: tap.output for n, tap in taps.items() if n.endswith(".router.index")}
            coarse, truth = (capture(run, prompt, routing) for run in runs[1:])
            captured[prompt_name] = prompt, taps
            answers[prompt_name], greedy = _greedy(runs, prompt)
            rules[prompt_name] = {"taps": {n: _tap_rule(taps[n], coarse[n], truth[n]) for n in taps}, "greedy": greedy}
        write_taps(place / "taps", captured)
        write_file(place / "greedy.json", to_json(answers))
        entries[name] = {"checkpoint": f"{at}/checkpoint", "taps": f"{at}/taps", "greedy": f"{at}/greedy.json", "prompts": rules}
    return entries


def _tap_rule(tap, coarse, truth):
    """A tap's entry: as of any result, but chosen experts are a set; with what else holds for bfloat16."""
    if tap.name.endswith(".router.index"):
        near, nearer = (_near_ties(run.inputs, truth.inputs) for run in (coarse, tap))
        return form(tap.output) | {"rule": "same set", "near_ties": nearer, "bfloat16": {"near_ties": near}}
    return _rule(tap.output, coarse.output, truth.output)


def _rule(expected, coarse, truth):
    """make_rule with the wider numbers for bfloat16; what is float64 here counts as float32 (one scalar)."""
    loose = TOLERANCE[torch.float32] / TOLERANCE[torch.float64] if expected.dtype == torch.float64 else 1.0
    rule = make_rule(expected, truth.double(), loose, rounding=ROUNDING)
    if rule["rule"] == "close":
        wide = make_rule(coarse.bfloat16(), truth.double(), rounding=2 * ROUNDING)
        rule["bfloat16"] = {"tolerance": wide["tolerance"], "floor": wide["floor"]}
    return rule


def _near_ties(given, truth):
    """Tokens (list) whose last chosen and first rejected expert, or group, lie closer than rounding moves their scores."""
    scores, wide = ((a["x"].double() @ a["weight"].double().T).sigmoid() + a["bias"].double() for a in (given, truth))
    tie = 4 * (scores - wide).abs().amax(dim=1) + 1e-6  # (T,)
    groups = wide.unflatten(1, (given["n_group"], -1))  # (T,E) → (T,groups,E/groups)
    best = groups.topk(min(2, groups.shape[2])).values.sum(dim=2)  # (T,groups)
    kept = torch.zeros_like(best).scatter(1, best.topk(given["topk_group"]).indices, 1.0)[..., None]
    wide = groups.masked_fill(kept == 0, -torch.inf).flatten(1)  # (T,E)
    near = (_gap(wide, given["top_k"]) < tie) | (_gap(best, given["topk_group"]) < 2 * tie)
    return near.nonzero()[:, 0].tolist()


def _gap(scores, count):
    """Distance (T,) between the last chosen and the first rejected of scores (T,·)."""
    ordered = F.pad(scores, (0, 1), value=-torch.inf).sort(dim=1, descending=True).values
    return ordered[:, count - 1] - ordered[:, count]


@torch.no_grad()
def _greedy(runs, prompt):
    """The greedy answer with log-probabilities and, best first, its rivals [token, lead over it]; and its rule.

    runs: the model in float32, bfloat16 and float64; the latter two, fed the same tokens, tell what rounding does.
    """
    answer = generate(runs[0], prompt.ids.tolist(), prompt.patches, prompt.grid_thw, max_new_tokens=NEW_TOKENS)[0]
    tokens, chosen = torch.tensor(answer.ids), torch.tensor(answer.logprobs)
    logprobs, coarse, truth = (_teacher_forced(run, prompt, tokens) for run in runs)  # (T,U)
    rule = _rule(chosen, *(values.gather(1, tokens[:, None])[:, 0] for values in (coarse, truth)))
    for numbers in (rule, rule["bfloat16"]):
        numbers["tie"] = numbers["tolerance"] * max(chosen.abs().max().item(), numbers["floor"])
    others = logprobs.scatter(1, tokens[:, None], -torch.inf).topk(RIVALS)
    leads = (chosen[:, None] - others.values).tolist()
    rivals = [[list(pair) for pair in zip(*step)] for step in zip(others.indices.tolist(), leads)]
    return {"tokens": tokens.tolist(), "logprobs": chosen.tolist(), "rivals": rivals}, rule


def _teacher_forced(model, prompt, tokens):
    """Log-probabilities (T,U) from which each of the generated tokens (T,) was chosen, in at least float32."""
    media = None if prompt.patches is None else model.encode_media(prompt.patches, prompt.grid_thw)
    answered = model.language_model.model.embed_tokens(tokens)[None]
    hidden, _ = model.hidden(torch.cat([model.embed(prompt.ids, media), answered], dim=1))
    logits = model.language_model.lm_head(hidden[0, -len(tokens) - 1 : -1])
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


# Comparing


def compare_model(name, entry, golden, theirs):
    """Verdicts on the taps of each prompt and on the greedy answers of one format.

    name, entry: of the manifest; golden, theirs: paths of the two directories. Returns a list of Verdict.
    """
    verdicts = []
    for prompt_name, rules in entry["prompts"].items():
        case, file = f"model.{name}.{prompt_name}", f"{entry['taps']}/{prompt_name}.safetensors"
        if not (theirs / file).is_file():
            verdicts.append(Verdict(case, "MISSING", "no such file"))
            continue
        try:
            yours = load_tensors(theirs / file)
        except CheckpointError as error:
            verdicts.append(judged(case, Difference(case, "missing", str(error))))
            continue
        verdict, tap = _compare_taps(case, rules["taps"], load_tensors(golden / file), yours)
        verdicts.append(replace(verdict, cause=_cause(golden, entry, prompt_name, tap, yours, verdict)) if tap else verdict)
    return verdicts + _compare_answers(f"model.{name}.greedy", entry, golden, theirs)


def _compare_taps(case, rules, ours, yours):
    """Verdict on the taps of one prompt, and the name of the first wrong one in execution order, "" if there is none."""
    compared, rerouted = 0, ""
    coarse = any(tensor.dtype == torch.bfloat16 for tensor in yours.values())
    for name, rule in rules.items():
        if name not in yours:
            continue
        rule = rule | rule["bfloat16"] if coarse and "bfloat16" in rule else rule
        expected, actual = ours[name], yours[name]
        if rule["rule"] == "same set":
            difference, rerouted = _other_experts(name, rule, expected, actual)
        else:
            if expected.is_floating_point() and actual.is_floating_point():
                actual = actual.to(expected.dtype)
            if name.endswith(".router.weights") and (index := name.replace(".weights", ".index")) in yours:
                expected, actual = _by_expert(expected, ours[index]), _by_expert(actual, yours[index])
            difference = differs(name, rule, expected, actual)
        if difference:
            return judged(case, difference), name
        compared += 1
        if rerouted:
            break
    strange = [n for n in sorted(yours) if n not in rules and not n.startswith("prompt.") and ".in." not in n]
    if not compared:
        words = f"none of our taps is in the file, but {', '.join(strange[:3]) or 'nothing'}"
        return judged(case, Difference(case, "missing", words)), ""
    words = f"{compared} of {len(rules)} taps compared" + (" as bfloat16" if coarse else "")
    words += f", none after {rerouted}: near-ties chose other experts, pin ours" if rerouted else ""
    return Verdict(case, "OK", words + (f"; unknown: {', '.join(strange[:3])}" if strange else "")), ""


def _by_expert(weights, index):
    """Weights (T,K) in ascending order of their experts (T,K)."""
    return weights.gather(1, index.argsort(dim=1)) if weights.shape == index.shape else weights


def _other_experts(name, rule, expected, actual):
    """Difference of chosen experts (T,K), near-ties excepted, and the name if any token at all was sent elsewhere."""
    if actual.shape != expected.shape or actual.is_floating_point():
        return differs(name, {"rule": "exact"}, expected, actual), name
    moved = (actual.sort(dim=1).values != expected.sort(dim=1).values).any(dim=1)  # (T,)
    wrong = moved.clone()
    wrong[rule["near_ties"]] = False
    if not wrong.any():
        return None, name if moved.any() else ""
    row = int(wrong.nonzero()[0])
    words = (f"{name}: other experts for {int(wrong.sum())} of {len(wrong)} tokens; first for {row}: "
             f"got {actual[row].tolist()}, expected {expected[row].tolist()} in any order")  # fmt: skip
    return Difference(name, "value", words, index=(row,)), name


def _cause(golden, entry, prompt_name, name, yours, verdict):
    """Probable cause of a wrong tap: the suspects of its operation, run on the inputs that it has here."""
    hint = "python oracle.py trace finds the first wrong operation"
    prompt = read_taps(golden / entry["taps"])[prompt_name].prompt
    taps = capture(load(golden / entry["checkpoint"], dtype=torch.float32), prompt)
    tap = taps[name]
    if tap.op not in OPS:
        return hint
    op, layer = OPS[tap.op], name.rpartition(".")[0]
    results = {t.result: t for t in taps.values() if t.op == tap.op and t.name.rpartition(".")[0] == layer} | {tap.result: tap}
    if len(results) < len(op.outputs) or any(t.name not in yours for t in results.values()):
        return hint
    given = {op.outputs[i]: yours[t.name].to(t.output.dtype) for i, t in results.items()}
    truth = {op.outputs[i]: t.output.double() for i, t in results.items()}
    difference = replace(verdict.difference, what=f"output {op.outputs[tap.result]}")
    suspect, cause = diagnose(op, [Record(tap.inputs, Outcome(given, {}), difference, Outcome(truth, {}))])
    return cause if suspect else f"{cause}; {hint}"


def _compare_answers(case, entry, golden, theirs):
    """Verdicts on the greedy answers of one format."""
    if not (theirs / entry["greedy"]).is_file():
        return [Verdict(case, "MISSING", "no such file")]
    try:
        yours = read_json(theirs / entry["greedy"])
    except GoldenError as error:
        return [judged(case, Difference(case, "missing", str(error)))]
    ours = read_json(golden / entry["greedy"])
    verdicts = []
    for prompt_name, rules in entry["prompts"].items():
        rule = rules["greedy"] | (rules["greedy"]["bfloat16"] if yours.get("computed_in") == "bfloat16" else {})
        verdicts.append(_compare_answer(f"{case}.{prompt_name}", rule, ours[prompt_name], yours.get(prompt_name)))
    return verdicts


def _compare_answer(case, rule, ours, yours):
    """Verdict on one greedy answer: its tokens up to a near-tie, and their log-probabilities."""
    if yours is None:
        return Verdict(case, "MISSING", "not in the file")
    tokens = yours.get("tokens") if isinstance(yours, dict) else None
    if not isinstance(tokens, list) or len(tokens) != len(ours["tokens"]):
        return judged(case, Difference("tokens", "shape", f"tokens should be a list of {len(ours['tokens'])} ids"))
    step = next((i for i, (a, b) in enumerate(zip(tokens, ours["tokens"])) if a != b), len(tokens))
    if step < len(tokens):
        if not any(token == tokens[step] and lead <= rule["tie"] for token, lead in ours["rivals"][step]):
            second, lead = ours["rivals"][step][0]
            words = f"token {step} is {tokens[step]}, expected {ours['tokens'][step]}, which leads {second} by {lead:.3g}"
            return judged(case, Difference("tokens", "value", words, index=(step,)))
    if "logprobs" in yours:
        try:
            given = torch.tensor(yours["logprobs"], dtype=torch.float32)
        except (TypeError, ValueError):
            return judged(case, Difference("logprobs", "shape", "logprobs should be a list of numbers"))
        expected = torch.tensor(ours["logprobs"])
        if given.shape == expected.shape:
            given, expected = given[:step], expected[:step]
        if found := differs("logprobs", rule, expected, given):
            return judged(case, found)
    return Verdict(case, "OK", f"{step} of {len(tokens)} tokens" + (", then a near-tie" if step < len(tokens) else ""))
