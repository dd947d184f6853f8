"""The register of methods: one entry each, by kind. The command line, docs and tests are made of it.

To add one, write its file and an entry here, below those of its kind. It imports nothing of the package.
"""

from __future__ import annotations

import functools
from typing import NamedTuple


class Method(NamedTuple):
    """One method of the literature."""

    # Its name in configs and on the command line.
    key: str
    # What it is, in a line.
    title: str
    # Of its paper.
    arxiv: str
    # Its rows in the literature list.
    rows: tuple[int, ...]
    # One of KINDS: structure, a LoRAConfig's method; start, step, company, knowledge, layer.
    kind: str
    # The module, below the package.
    home: str
    # Whether it was checked against an oracle that is not our own code, and its spec against the paper's.
    verified: bool = True

    @property
    def file(self) -> str:
        """Where it is, from the root of the repository."""
        return f"lora_kernels/{self.home.replace('.', '/')}.py"


# Kind -> what one uses of that kind.
USES = {
    "structure": "`LoRAConfig(method=…)`",
    "start": "`LoRAConfig(init_lora_weights=…)`",
    "step": "`optim`, `schedules`, `compress`",
    "company": "`compose`, `routing`",
    "knowledge": "`stats`, `analysis`",
    "layer": "`nn`",
}
KINDS = tuple(USES)
# Of each the name and what it is, then paper, rows, kind and home.
# fmt: off
REGISTER = (
    # Structures of two factors.
    Method("lora", "LoRA; rsLoRA with `use_rslora=True`",
           "2106.09685", (1, 87), "structure", "adapters.lora"),
    Method("lora_fa", "LoRA-FA: A frozen, x not saved",
           "2308.03303", (82,), "structure", "adapters.low_rank.lora_fa"),
    Method("lora_xs", "LoRA-XS: an r×r core between SVD factors",
           "2405.17604", (4,), "structure", "adapters.low_rank.lora_xs"),
    Method("sora", "SoRA: a gate on the rank, with a proximal step",
           "2311.11696", (84,), "structure", "adapters.low_rank.sora"),
    Method("dylora", "DyLoRA: any rank ≤ r at run time, as a view",
           "2210.07558", (76,), "structure", "adapters.low_rank.dylora"),
    Method("dora", "DoRA (`use_dora=True`): W + (α/r)BA, rows of trained length",
           "2402.09353", (), "structure", "adapters.low_rank.dora"),
    Method("moslora", "MoSLoRA: a mixer between A and B",
           "2406.11909", (33,), "structure", "adapters.low_rank.moslora"),
    Method("mt_lora", "Matrix-Transformation LoRA: C, CCᵀ, CD or C+D between A and B",
           "2403.07440", (5,), "structure", "adapters.low_rank.mt_lora"),
    Method("deep_lora", "Deep LoRA: three or more factors, or their compressed form",
           "2406.04112", (18, 57), "structure", "adapters.low_rank.deep_lora"),
    Method("sharelora", "ShareLoRA: A, B or both shared by the layers of a role",
           "2406.10785", (35,), "structure", "adapters.low_rank.sharelora"),
    Method("aflora", "AFLoRA: trained scales of ranks and outputs; A and B freeze",
           "2403.13269", (69,), "structure", "adapters.low_rank.aflora"),
    Method("lamda", "LaMDA: a core between a frozen A and a B that freezes",
           "2406.12832", (48,), "structure", "adapters.low_rank.lamda"),
    Method("delta_lora", "Delta-LoRA, with `schedules.DeltaLoRA`: W follows B A",
           "2309.02411", (75,), "structure", "adapters.low_rank.delta_lora"),
    Method("bilora", "BiLoRA, with `schedules.BiLoRA`: B diag(e) A, e on other samples",
           "2403.13037", (68,), "structure", "adapters.low_rank.bilora", verified=False),
    Method("reslora", "ResLoRA: residual paths between the branches of a role",
           "2402.18039", (37,), "structure", "adapters.low_rank.reslora"),
    Method("rst_lora", "RST-LoRA: each token's input scaled by discourse",
           "2405.00657", (38,), "structure", "adapters.low_rank.rst_lora"),
    Method("ta_lora", "TA-LoRA: one Tucker tensor for several tasks",
           "2403.10971", (41,), "structure", "adapters.low_rank.ta_lora", verified=False),
    Method("adalora", "AdaLoRA, with `schedules.AdaLoRA`: ranks of a budget go where they matter",
           "2303.10512", (), "structure", "adapters.low_rank.adalora"),
    Method("alora_alloc", "ALoRA, with `schedules.ALoRAAllocator`: ranks move to where they matter",
           "2403.16187", (36,), "structure", "adapters.low_rank.alora_alloc"),
    Method("blora", "Bayesian-LoRA, with `schedules.BLoRA`: gates over bits and ranks",
           "2406.13046", (32,), "structure", "adapters.low_rank.blora"),
    Method("advlora", "AdvLoRA: a trained scale, with `schedules.advlora_loss`",
           "2404.13425", (17, 58), "structure", "adapters.low_rank.advlora", verified=False),
    Method("lorpman", "LORPMAN: an update for each task, mixed by a preference",
           "2407.20734", (2,), "structure", "adapters.low_rank.lorpman", verified=False),
    # Structures whose factors are shared, generated or chosen.
    Method("vblora", "VB-LoRA: factors from a bank of vectors that all layers share",
           "2405.15179", (51,), "structure", "adapters.generated.vblora"),
    Method("loretta_rep", "LoRETTA_rep: both factors are tensor trains",
           "2402.11417", (12,), "structure", "adapters.generated.loretta_rep"),
    Method("loretta_adp", "LoRETTA_adp: a bottleneck of tensor trains beside a linear",
           "2402.11417", (12,), "structure", "adapters.generated.loretta_adp"),
    Method("vlora", "VLoRA: an A for each sample, made of its image",
           "2405.20339", (55,), "structure", "adapters.generated.vlora"),
    Method("lonas", "LoNAS: elastic ranks and widths, as views",
           "", (60,), "structure", "adapters.generated.lonas"),
    Method("lofit", "LoFiT: scales, then offsets, of attention heads",
           "2406.01563", (54,), "structure", "adapters.layer_kinds.lofit"),
    # Structures over convolutions, quantised bases and several outputs.
    Method("flora_core", "FLoRA: a Tucker core, also of a convolution's kernel",
           "2405.14739", (53,), "structure", "adapters.layer_kinds.flora_core"),
    Method("mosa_conv", "MoSA: loralib's LoRA of a convolution",
           "2211.03165", (83,), "structure", "adapters.layer_kinds.mosa_conv"),
    Method("merged_linear", "loralib's MergedLinear: LoRA of some parts of one linear",
           "2106.09685", (1,), "structure", "adapters.layer_kinds.merged_linear"),
    Method("qalora", "QA-LoRA: a branch on groups of inputs; merges into int4",
           "2309.14717", (45,), "structure", "adapters.layer_kinds.qalora"),
    Method("ir_qlora", "IR-QLoRA: A and B with means and repeats beside them",
           "2402.05445", (49,), "structure", "adapters.layer_kinds.ir_qlora"),
    # Structures that are not of low rank.
    Method("mora", "MoRA: a square matrix between folding and unfolding",
           "2405.12130", (52, 62), "structure", "adapters.structured.mora"),
    Method("miss", "MiSS: MoRA's fold in the place of A",
           "2409.15371", (), "structure", "adapters.structured.miss"),
    Method("fourierft", "FourierFT: few frequencies of ΔW",
           "2405.03003", (59,), "structure", "adapters.structured.fourierft"),
    Method("quanta", "QuanTA: a chain of gates on pairs of axes",
           "2406.00132", (50,), "structure", "adapters.structured.quanta"),
    Method("compacter", "Compacter: sums of Kronecker products, rules shared",
           "2106.04647", (88,), "structure", "adapters.structured.compacter"),
    Method("loha", "LoHa: the elementwise product of two LoRAs",
           "2309.14859", (), "structure", "adapters.structured.loha"),
    Method("lokr", "LoKr: a Kronecker product, its larger factor of low rank",
           "2309.14859", (), "structure", "adapters.structured.lokr"),
    Method("smt", "SMT: chosen blocks of W train",
           "2405.15525", (65,), "structure", "adapters.structured.smt"),
    Method("neft", "NeFT: chosen neurons train",
           "2403.11621", (72,), "structure", "adapters.structured.neft"),
    # Mixtures: which experts a row uses.
    Method("mixlora", "MixLoRA: the best k experts of each row",
           "2404.15159", (), "structure", "routing.mixlora"),
    Method("loramoe", "LoRAMoE: all experts, weighed; a localised balance loss",
           "2312.09979", (80,), "structure", "routing.loramoe"),
    Method("sira", "SiRA: the best k experts, with capacity and expert dropout",
           "2311.09179", (86,), "structure", "routing.sira", verified=False),
    Method("moa", "Mixture-of-LoRAs: a sequence's own expert in each layer",
           "2403.03432", (47,), "structure", "routing.moa", verified=False),
    Method("saml", "SAML: factors averaged for each utterance",
           "2406.19706", (28,), "structure", "routing.saml"),
    Method("xlora", "X-LoRA: experts weighed by scales from outside the layers",
           "2402.07148", (), "structure", "routing.saml"),
    Method("arrow", "Arrow: trained experts, routed by their main directions",
           "2405.11157", (), "structure", "routing.arrow"),
    Method("ramole", "RAMoLE: retrieved experts, weighed by what they add",
           "2406.16989", (31,), "structure", "routing.ramole", verified=False),
    # Starts.
    Method("gaussian", "Gaussian start: A of N(0, 1/r²)",
           "", (), "start", "init.random"),
    Method("orthogonal", "Orthogonal start: neither factor zero, their product is",
           "", (), "start", "init.orthogonal"),
    Method("olora", "OLoRA: the first columns of W's QR decomposition",
           "2406.01775", (), "start", "init.olora"),
    Method("pissa", "PiSSA: principal singular vectors of W; `pissa_niter_N`",
           "2404.02948", (), "start", "init.pissa"),
    Method("milora", "MiLoRA: minor singular vectors of W",
           "2406.09044", (20,), "start", "init.milora"),
    Method("mica", "MiCA: B of minor left singular vectors, frozen",
           "2604.01694", (), "start", "init.mica"),
    Method("asym", "Asymmetry: A random, orthonormal and frozen; or B",
           "2402.16842", (27,), "start", "init.asym"),
    Method("clusters", "AdvLoRA's start: clusters of the rows of W",
           "2404.13425", (17, 58), "start", "init.clusters", verified=False),
    Method("loftq", "LoftQ: factors that make up for quantising W",
           "2310.08659", (), "start", "init.loftq"),
    Method("eva", "EVA: principal components of a layer's inputs",
           "2410.07170", (), "start", "init.eva"),
    Method("corda", "CorDA: singular vectors of W weighted by its inputs",
           "2406.05223", (25,), "start", "init.corda"),
    Method("lora_ga", "LoRA-GA: singular vectors of W's gradient",
           "2407.05000", (), "start", "init.lora_ga"),
    Method("expressive_power", "Expressive power (`expressive`): factors that make a frozen net another one",
           "2310.17513", (77,), "start", "init.expressive"),
    # Steps: optimisers, schedules, compressions.
    Method("lora_plus", "LoRA+: B learns faster than A",
           "2402.12354", (63,), "step", "optim.lora_plus"),
    Method("lora_fa_opt", "LoRA-FA's optimiser: B's gradient, projected",
           "2308.03303", (82,), "step", "optim.lora_fa"),
    Method("riemannian_lora", "Riemannian preconditioning of A and B",
           "2402.02347", (23,), "step", "optim.riemannian"),
    Method("flora_opt", "Flora: momentum and accumulation as random sketches",
           "2402.03293", (19,), "step", "optim.flora"),
    Method("galore", "GaLore: W trains through a LoRA backward pass",
           "2403.03507", (71,), "step", "optim.galore"),
    Method("dfo_lora", "LoRA without gradients: CMA-ES, a population a batch",
           "2403.01754", (13, 66), "step", "optim.derivative_free"),
    Method("plora", "PeriodicLoRA: unloaded into W each stage",
           "2402.16141", (64,), "step", "schedules.plora", verified=False),
    Method("lorasc", "LoRASC: fast cycles on a noisy W, a part of each kept",
           "2407.01491", (21,), "step", "schedules.lorasc", verified=False),
    Method("lisa", "LISA: a few blocks train at a time, by lot",
           "2403.17919", (73,), "step", "schedules.lisa"),
    Method("relora", "ReLoRA: merged into W and restarted",
           "2307.05695", (42,), "step", "schedules.relora"),
    Method("hiddenkey", "HiddenKey: keys and hidden numbers dropped, two passes agree",
           "2403.00812", (70,), "step", "schedules.hiddenkey", verified=False),
    Method("autolora_robust", "AutoLoRa: natural samples train B A, adversarial ones W",
           "2310.01818", (3,), "step", "schedules.autolora_robust"),
    Method("advlora_loss", "AdvLoRA's loss: samples and the worst ones near them",
           "2404.13425", (17, 58), "step", "schedules.advlora", verified=False),
    Method("lampat", "LAMPAT: adapters learn under the worst small change of embeddings",
           "2401.04348", (11,), "step", "schedules.lampat"),
    Method("inflora", "InfLoRA: each task in inputs that the ones before have not",
           "2404.00228", (16,), "step", "schedules.inflora"),
    Method("explora", "ExPLoRA: pre-training goes on with one whole block and LoRA",
           "2406.10973", (34,), "step", "schedules.explora", verified=False),
    Method("lamda_freezer", "LaMDA's freezer: B stops learning column by column",
           "2406.12832", (48,), "step", "schedules.lamda"),
    Method("aflora_freezer", "AFLoRA's freezer: A and B of small scores stop learning",
           "2403.13269", (69,), "step", "schedules.aflora"),
    Method("dylora_sampler", "DyLoRA's sampler: one rank for all layers, new at each step",
           "2210.07558", (76,), "step", "schedules.dylora"),
    Method("sora_schedule", "SoRA's schedule: proximal steps whose threshold grows by stages",
           "2311.11696", (84,), "step", "schedules.sora"),
    Method("rank_adaptor", "RankAdaptor: ranks by a network that guesses scores",
           "2406.15734", (7,), "step", "schedules.rank_adaptor", verified=False),
    Method("lonas_search", "LoNAS's search: sub-networks by NSGA-II",
           "", (60,), "step", "schedules.lonas_search"),
    Method("prilora", "PRILoRA: ranks rise with depth, A pruned by what it reads",
           "2401.11316", (10,), "step", "schedules.prilora", verified=False),
    Method("roselora", "RoseLoRA: rows of A and columns of B grow sparse",
           "2406.10777", (40,), "step", "schedules.roselora"),
    Method("autolora_rank", "AutoLoRA: ranks by gates that learn from validation",
           "2403.09113", (6,), "step", "schedules.autolora_rank"),
    Method("lora_asr_study", "Training strategies: a warm-up at high rank, then its best low one",
           "2401.10447", (9,), "step", "schedules.rank_warmup", verified=False),
    Method("lorap", "LoRAP: attention of low rank, feed-forward layers of fewer neurons",
           "2404.09695", (26,), "step", "compress.lorap"),
    Method("tensor_rank_reduction", "Rank reduction: W trains beside the decomposition that it becomes",
           "", (79,), "step", "schedules.tensor_rank_reduction", verified=False),
    # Company: composition, merging, federations.
    Method("merging", "PEFT's `add_weighted_adapter`: cat, SVD, TIES, DARE, …",
           "2306.01708", (), "company", "compose.weighted"),
    Method("lora_retriever", "LoraRetriever: `routing.AdapterIndex`, the adapters nearest to a prompt",
           "2402.09997", (22,), "company", "routing.lora_retriever"),
    Method("lora_composite", "LoRA Composite and Switch: adapters averaged in one pass, or in turns",
           "2402.16843", (67,), "company", "compose.denoising"),
    Method("lora_composer", "LoRA-Composer: each concept's adapter in its box of the image",
           "2403.11627", (8,), "company", "compose.regions", verified=False),
    Method("psim", "PSIM: an adapter of random labels tells poisoned inputs",
           "2402.12168", (46,), "company", "compose.psim"),
    Method("rlhf_lora", "PPO with policy, value and reference on one base, in one pass",
           "2309.09055", (78,), "company", "compose.rlhf"),
    Method("fedlora_pfl", "FedDecomp: W shared and averaged, adapters each client's own",
           "2406.19931", (15,), "company", "compose.feddecomp"),
    Method("fed_replication", "Federated LoRA of unequal ranks: missing slices replicated",
           "2406.17477", (30,), "company", "compose.replication", verified=False),
    Method("flasc", "FLASC: sparse messages both ways, dense training between",
           "2406.05233", (39,), "company", "compose.flasc"),
    # Knowledge: what a trained model knows.
    Method("select_blocks", "SMT's choice of blocks, by gradients of a warm-up",
           "2405.15525", (65,), "knowledge", "stats.select"),
    Method("select_neurons", "NeFT's choice of neurons, by what a short training turns",
           "2403.11621", (72,), "knowledge", "stats.select"),
    Method("learns_less_forgets_less",
           "LoRA learns less and forgets less: effective ranks, learning and forgetting",
           "2405.09673", (61,), "knowledge", "analysis.spectra"),
    Method("lorb", "LoRB: losses that rescore n-best lists, `mwer_loss` and `correlation_penalty`",
           "2309.15223", (85,), "knowledge", "analysis.rescoring", verified=False),
    Method("dsire", "DSiRe: the size of the training set, from singular values",
           "2406.19395", (29,), "knowledge", "analysis.dsire"),
    Method("laplace_lora", "Laplace-LoRA: a normal posterior of A and B, by K-FAC",
           "2308.13111", (81,), "knowledge", "stats.laplace"),
    # Layers.
    Method("memvp", "MemVP: `nn.MemVPFFN`: an image as keys and values of an FFN",
           "2405.05615", (56,), "layer", "nn.methods.memvp"),
    Method("mtlora_mt", "MTLoRA: `nn.MultiTaskLinear`, an output for each task",
           "2403.20320", (44,), "layer", "nn.methods.multitask"),
    Method("lors", "LORS: `nn.LORSLinear`, `nn.LORSMixing`: stacks that share a weight",
           "2403.04303", (14,), "layer", "nn.methods.lors"),
    Method("colora_pde", "CoLoRA: `nn.CoLoRALinear`, `nn.CoLoRANet`: gates that move through time",
           "2402.14646", (24,), "layer", "nn.methods.colora"),
    Method("clip_lora", "CLIP-LoRA: few-shot adaptation of both towers, one recipe",
           "2405.18541", (43,), "layer", "nn.methods.clip_lora"),
    Method("compacter_adapter", "Compacter: bottlenecks of PHM layers behind sublayers",
           "2106.04647", (88,), "layer", "nn.methods.compacter"),
    Method("lbp_wht", "LBP-WHT: a backward pass through low Walsh frequencies",
           "2309.15275", (74,), "layer", "nn.methods.wht"),
)
# fmt: on


@functools.cache
def structures() -> dict[str, Method]:
    """Key -> the line of each structure, which a :class:`LoRAConfig` names."""
    return {one.key: one for one in REGISTER if one.kind == "structure"}


def listing() -> str:
    """The register as ``docs/methods.md`` has it."""
    lines = ["# Methods", "", "Made by `lora-kernels methods --write` from `lora_kernels/methods.py`."]
    for kind in KINDS:
        lines += ["", f"## {kind.capitalize()}", "", f"{USES[kind]}.", "", *_rows(kind)]
    return "\n".join(lines) + "\n"


def _rows(kind: str) -> list[str]:
    lines = ["| key | what it is | paper | rows | file | verified |", "|---|---|---|---|---|---|"]
    for one in REGISTER:
        if one.kind == kind:
            rows = ", ".join(f"{row:02}" for row in one.rows) or "–"
            state = "yes" if one.verified else "no"
            cells = (f"`{one.key}`", one.title, _paper(one), rows, f"`{one.file}`", state)
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def table() -> str:
    """The names by kind, as the README has them."""
    lines = ["| kind | names |", "|---|---|"]
    for kind in KINDS:
        names = " ".join(f"`{one.key}`" for one in REGISTER if one.kind == kind)
        lines.append(f"| {kind}: {USES[kind]} | {names} |")
    return "\n".join(lines) + "\n"


def _paper(one: Method) -> str:
    return f"[{one.arxiv}](https://arxiv.org/abs/{one.arxiv})" if one.arxiv else "–"
