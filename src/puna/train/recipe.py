"""What a training recipe may say: one dataclass per section, one line of help per key."""

from __future__ import annotations

from dataclasses import dataclass, field

from puna.base.config import knob


@dataclass(frozen=True)
class ModelSection:
    """Where the shape and the first weights come from."""

    path: str = knob("", "model folder to start from (weights and shape); empty: random weights")
    preset: str = knob("debug", "published shape to start from when `path` is empty")
    vocab_size: int = knob(0, "rows of the embedding; 0: the tokenizer's size")
    hidden_size: int = knob(0, "model width; 0 here and below: the preset's")
    num_hidden_layers: int = knob(0, "blocks")
    num_attention_heads: int = knob(0, "query heads")
    num_key_value_heads: int = knob(0, "key/value heads; must divide the query heads")
    head_dim: int = knob(0, "channels per head; 0: hidden_size / num_attention_heads")
    intermediate_size: int = knob(0, "feed-forward width")
    tie_word_embeddings: str = knob("", "true: embedding and head are one matrix; false: two; empty: the preset's")
    max_position_embeddings: int = knob(0, "longest context in tokens")
    rope_theta: float = knob(0.0, "rotary base")


@dataclass(frozen=True)
class DataSection:
    """Where tokens come from, in which shares, and how they are cut into sequences."""

    text: tuple[str, ...] = knob(
        (), "files, folders or globs with text, held in memory; python:stdlib is Python's own library"
    )
    shards: tuple[str, ...] = knob(
        (), "instead of text: folders that `puna tokenize` wrote, local or s3:// gs:// az://"
    )
    weights: tuple[float, ...] = knob((), "share of each of `shards` in every batch; empty: by their size")
    schedule: tuple[str, ...] = knob((), 'weights from a step on, one entry each: "5000: 0.5 0.5"')
    tokenizer: str = knob("", "tokenizer folder or file; empty: the one in model.path")
    seq_len: int = knob(256, "tokens per sequence")
    val_fraction: float = knob(0.05, "share of the files of `text` held out, whole, for validation")
    packing: str = knob(
        "concat", "concat: windows over text; best_fit: whole documents; decompose: 2^k of one document"
    )
    cross_documents: bool = knob(False, "attention and positions go on from one document to the next in a sequence")
    mask_tags: bool = knob(True, "tokens that name a document's source (puna tokenize --tag) are read, not learnt")
    fim_rate: float = knob(0.0, "share of documents told as fill-in-the-middle; needs packing best_fit")
    fim_spm_rate: float = knob(0.5, "share of those in suffix-prefix-middle order, the rest in prefix-suffix-middle")
    shortest: int = knob(64, "decompose: shortest sequence, a power of two; shorter tails are dropped")
    curriculum: str = knob("mixture", "decompose: mixture (all lengths throughout) or short_to_long (in 8 cycles)")
    cache_dir: str = knob("", "where shards of a bucket are kept; empty: $PUNA_CACHE, else ~/.cache/puna")
    cache_gib: float = knob(64.0, "size of that cache in GiB, shared by all processes of the machine")


@dataclass(frozen=True)
class OptimSection:
    """AdamW (Loshchilov & Hutter 2019) and its schedule: linear warm-up, then cosine."""

    lr: float = knob(1e-3, "peak learning rate")
    min_lr_ratio: float = knob(0.1, "last learning rate as a share of the peak")
    warmup_steps: int = knob(100, "steps of linear warm-up")
    betas: tuple[float, float] = knob((0.9, 0.95), "decay of the two moments")
    eps: float = knob(1e-8, "added to the root of the second moment")
    weight_decay: float = knob(0.1, "on matrices only; norms and biases have none")
    grad_clip: float = knob(1.0, "largest global gradient norm; 0: no clipping")
    z_loss: float = knob(0.0, "weight of logsumexp^2, keeps logits small (1e-4 is usual)")


@dataclass(frozen=True)
class TrainSection:
    """The step."""

    steps: int = knob(1000, "optimizer steps")
    batch_size: int = knob(16, "sequences per optimizer step")
    micro_batch_size: int = knob(0, "sequences per forward pass; 0: all of batch_size")
    dtype: str = knob("float32", "arithmetic: float32, bfloat16 or float16 (loss-scaled); weights stay float32")
    device: str = knob("auto", "auto, cpu or cuda")
    log_every: int = knob(1, "steps between printed lines; every step is in metrics.jsonl")
    activation_checkpointing: str = knob(
        "none", "none, selective (every second product is kept) or full (block inputs)"
    )
    compile: bool = knob(False, "torch.compile every block")
    float8: bool = knob(False, "matrix products of the blocks in float8 (tensorwise scales)")


@dataclass(frozen=True)
class ParallelSection:
    """How the job is cut over ranks; their product is the number of ranks."""

    dp_replicate: int = knob(1, "copies of the weights, each trained on its own sequences (DDP, HSDP)")
    dp_shard: int = knob(0, "ranks that share one copy (FSDP); 0: all ranks that are left")
    tp: int = knob(1, "ranks that share every matrix product; keep it within a node")
    pp: int = knob(1, "pipeline ranks, each with a part of the layers")
    cp: int = knob(1, "ranks that share a sequence")
    zero: int = knob(3, "what FSDP cuts: 1 optimizer state, 2 and gradients, 3 and weights")
    cpu_offload: bool = knob(False, "weights, gradients and optimizer state in the host's memory")
    sequence_parallel: bool = knob(True, "under tp, norms and residuals are cut along the sequence")
    async_tp: bool = knob(False, "under tp, transfers run behind the products beside them, in ring steps")
    pp_schedule: str = knob("1f1b", "gpipe, 1f1b, interleaved, zbv or dualpipev")
    pp_microbatches: int = knob(0, "microbatches of a rank's batch; 0: by micro_batch_size, else at least 2 x pp")
    pp_stages_per_rank: int = knob(0, "stages of a pipeline rank; 0: 1, or 2 for interleaved, zbv and dualpipev")
    cp_method: str = knob("allgather", "how cp ranks meet: allgather (keys and values), ulysses (heads) or ring")
    backend: str = knob("", "of torch.distributed: nccl or gloo; empty: by the device")
    first_timeout: float = knob(1800.0, "seconds a collective may take until the first step is done")
    timeout: float = knob(300.0, "seconds it may take from then on; then the job ends and says where each rank stood")
    environment: tuple[str, ...] = knob((), 'variables of the communication library: "NCCL_ALGO=Ring", one entry each')


@dataclass(frozen=True)
class QuantSection:
    """Quantization-aware training: the model computes with the rounded numbers that will be served."""

    preset: str = knob("", "what it will be quantized to: a preset of `puna quantize` such as int4_wo; empty: off")
    weights: str = knob("", "another number format of the weights, such as int4_g32; empty: the preset's")
    activations: str = knob("", "of the inputs: none, int8 or fp8 (per token); empty: the preset's")
    overrides: tuple[str, ...] = knob((), 'formats for some layers, later ones win: "*.down_proj=int8"')
    start_step: int = knob(0, "steps of plain training before it; validation is always with rounded numbers")


@dataclass(frozen=True)
class CheckpointSection:
    """When to save and what to keep."""

    every: int = knob(500, "steps between saves; the last step is always saved")
    folder: str = knob("", "where saves go, a folder or s3:// gs:// az://; empty: `out`")
    keep_last: int = knob(2, "newest saves kept; 0: all")
    keep_every: int = knob(0, "saves of steps that this divides are kept for good; 0: none")
    background: bool = knob(True, "training goes on while a save is written; it costs a copy in the host's memory")
    grace: float = knob(25.0, "seconds after SIGTERM in which the last save must be done; 0: no limit")
    resume: str = knob("auto", "auto: continue what `out` holds; never: refuse to; or a step folder")


@dataclass(frozen=True)
class ValidationSection:
    """Held-out files."""

    every: int = knob(100, "steps between validations; 0: only at the end")
    max_tokens: int = knob(65536, "tokens looked at each time")


@dataclass(frozen=True)
class Recipe:
    """A training run. `task` is pretrain today."""

    out: str = knob("runs/puna", "folder of the run")
    task: str = knob("pretrain", "pretrain: next-token loss on every token")
    seed: int = knob(0, "of weights and data order")
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    quant: QuantSection = field(default_factory=QuantSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
