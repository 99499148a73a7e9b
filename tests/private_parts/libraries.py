"""The private parts of torch and transformers."""

from __future__ import annotations

import inspect

from tests.private_parts import checks
from tests.private_parts.part import PrivatePart, resolve

ATTENTION = "sinkmodel/softmax_sinks/attention.py"
ARCHITECTURES = "sinkmodel/softmax_sinks/architectures.py"
STRATEGIES = "recipes/training/processes/strategies.py"
HOOK = "sinkmodel/cache/hook.py"
CUSTOM = "sinkmodel/export/custom_generate.py"
RENORMALISED = "a sink in the softmax: the fused kernel's output and log-sum-exp"
RENORMALISED_BACKWARD = "its backward pass, which is given another log-sum-exp"


TORCH = [
    PrivatePart(
        "torch",
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
        (ATTENTION, "bench/gpu/scoring.py"),
        f"{RENORMALISED}, on a CPU",
        check=checks.operator(
            "aten._scaled_dot_product_flash_attention_for_cpu",
            *("query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"),
        ),
    ),
    PrivatePart(
        "torch",
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
        (ATTENTION,),
        f"{RENORMALISED_BACKWARD}, on a CPU",
        check=checks.operator(
            "aten._scaled_dot_product_flash_attention_for_cpu_backward",
            *("grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal", "attn_mask", "scale"),
        ),
    ),
    PrivatePart(
        "torch",
        "torch.ops.aten._scaled_dot_product_efficient_attention",
        (ATTENTION,),
        f"{RENORMALISED}, on a GPU in fp32",
        check=checks.operator(
            "aten._scaled_dot_product_efficient_attention",
            *("query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "scale"),
        ),
    ),
    PrivatePart(
        "torch",
        "torch.ops.aten._scaled_dot_product_efficient_attention_backward",
        (ATTENTION,),
        f"{RENORMALISED_BACKWARD}, on a GPU in fp32",
        check=checks.operator(
            "aten._scaled_dot_product_efficient_attention_backward",
            *("grad_out_", "query", "key", "value", "attn_bias", "out", "logsumexp", "philox_seed", "philox_offset"),
            *("dropout_p", "grad_input_mask", "is_causal", "scale"),
        ),
    ),
    PrivatePart(
        "torch",
        "torch.ops.aten._scaled_dot_product_flash_attention",
        (ATTENTION,),
        f"{RENORMALISED}, on a GPU in bf16 and fp16",
        check=checks.operator(
            "aten._scaled_dot_product_flash_attention",
            *("query", "key", "value", "dropout_p", "is_causal", "return_debug_mask", "scale"),
        ),
    ),
    PrivatePart(
        "torch",
        "torch.ops.aten._scaled_dot_product_flash_attention_backward",
        (ATTENTION,),
        f"{RENORMALISED_BACKWARD}, on a GPU in bf16 and fp16",
        check=checks.operator(
            "aten._scaled_dot_product_flash_attention_backward",
            *("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
            *("dropout_p", "is_causal", "philox_seed", "philox_offset", "scale"),
        ),
    ),
    PrivatePart(
        "torch",
        "torch.ops.mkldnn._linear_pointwise",
        ("sinkmodel/products.py",),
        "oneDNN's product of matrices in fp32; used only if it is there, passes a trial and is faster",
        check=checks.operator("mkldnn._linear_pointwise", "X", "W", "B", "attr", "scalars", "algorithm"),
    ),
    PrivatePart(
        "torch",
        "torch._dynamo.decorators.skip",
        (HOOK,),
        "torch.compile leaves a forward with a cache alone, and compiles the model's forward that it calls",
    ),
    PrivatePart(
        "torch",
        "torch._dynamo.reset",
        ("bench/decoding.py", "bench/gpu/machine.py"),
        "forgets what earlier measurements compiled, so that none changes the next",
    ),
    PrivatePart(
        "torch",
        "torch._dynamo.utils.counters",
        ("bench/gpu/decoding.py",),
        "the number of graphs that the compiler did not make CUDA graphs of",
    ),
    PrivatePart(
        "torch",
        "torch.ops.aten._flash_attention_forward",
        ("bench/gpu/scoring.py",),
        "FlashAttention with a window: the time to compare the scoring of a stream with",
        check=checks.operator(
            "aten._flash_attention_forward",
            *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"),
            *("return_debug_mask", "scale", "window_size_left", "window_size_right", "seqused_k", "alibi_slopes"),
            *("block_table", "num_splits"),
        ),
    ),
    PrivatePart(
        "torch",
        "torch._dynamo.mark_static_address",
        ("sinkmodel/cache/layer.py",),
        "CUDA graphs read the ring of keys in place; without it each step copies the ring",
    ),
    PrivatePart(
        "torch",
        "torch.utils._pytree.tree_map_only",
        ("recipes/training/callbacks/checkpoints.py",),
        "copies all tensors of a checkpoint, wherever they are in it",
    ),
    PrivatePart(
        "torch",
        "torch.distributed.distributed_c10d._set_pg_timeout",
        (STRATEGIES,),
        "DeepSpeed makes a group of its own with torch's default time-out; it gets that of `training.timeout`",
        check=checks.takes("torch.distributed.distributed_c10d._set_pg_timeout", "timeout", "group"),
    ),
    PrivatePart(
        "torch",
        "torch.nn.modules.dropout._DropoutNd",
        ("sinkmodel/trainable.py",),
        "the base class of all dropout modules, by which they are found and set to 0",
        check=lambda: issubclass(resolve("torch.nn.Dropout"), resolve("torch.nn.modules.dropout._DropoutNd")),
    ),
]

TRANSFORMERS = [
    PrivatePart(
        "transformers",
        "transformers.PretrainedConfig._attn_implementation",
        (
            ARCHITECTURES,
            "sinkmodel/band.py",
            "sinkmodel/cache/forward.py",
            "sinkmodel/cache/inputs.py",
            CUSTOM,
            "sinkmodel/attention_maps.py",
            "sinkmodel/memories/hooks.py",
            "sinkmodel/memories/admission.py",
            "sinkmodel/memories/memory.py",
            "sinkmodel/trainable.py",
            "bench/scoring.py",
        ),
        "the name of a model's attention function: to refuse one that takes no mask, and to put it back afterwards",
    ),
    PrivatePart(
        "transformers",
        "transformers.PretrainedConfig._attn_implementation_internal",
        (ARCHITECTURES,),
        "the attribute under it: a model with a sink in its softmax takes no attention function that drops the sink",
        check=lambda: (
            checks.tiny_llama().config._attn_implementation_internal == checks.tiny_llama().config._attn_implementation
        ),
    ),
    PrivatePart(
        "transformers",
        "transformers.PreTrainedModel._init_weights",
        (ARCHITECTURES,),
        "sets a learned sink in the softmax to zero; overridden",
        check=checks.takes("transformers.PreTrainedModel._init_weights", "module"),
    ),
    PrivatePart(
        "transformers",
        "transformers.GenerationMixin._prepare_cache_for_generation",
        (HOOK,),
        "`generate` asks a cache that has a hook before the first token; the wrapper reads the arguments by name",
        patched=True,
        check=checks.cache_arguments,
    ),
    PrivatePart(
        "transformers",
        "transformers.GenerationMixin.prepare_inputs_for_generation",
        (HOOK,),
        "`generate` asks the cache before each step, by the undocumented `next_sequence_length`",
        patched=True,
        check=checks.takes("transformers.GenerationMixin.prepare_inputs_for_generation", "next_sequence_length"),
    ),
    PrivatePart(
        "transformers",
        "transformers.GenerationConfig._mask_length",
        (HOOK,),
        "the length of a mask of ones that `generate` has dropped",
        check=checks.mask_length,
    ),
    PrivatePart(
        "transformers",
        "transformers.GenerationConfig._pad_token_tensor",
        (CUSTOM,),
        "the pad for rows that have ended; transformers 4.57 has it too",
        check=checks.pad_token,
    ),
    PrivatePart(
        "transformers",
        "transformers.GenerationConfig._from_model_config",
        ("sinkmodel/bases.py",),
        "distinguishes a generation config made from defaults from one that a model ships",
        check=checks.from_model_config,
    ),
    PrivatePart(
        "transformers",
        "transformers.quantizers.base._is_quantized",
        ("sinkmodel/model_files.py",),
        "a mark in the config of a model read from GGUF; removed, since its weights are in fp32 by then",
        check=lambda: "config._is_quantized" in inspect.getsource(resolve("transformers.quantizers.base")),
    ),
    PrivatePart(
        "transformers",
        "transformers.initialization.no_init_weights",
        ("sinkmodel/loading.py",),
        "a model whose weights come from a checkpoint draws no random ones first",
    ),
    PrivatePart(
        "transformers",
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        ("sinkmodel/attention.py",),
        "transformers' own SDPA, called without a mask",
        check=checks.takes(
            "transformers.integrations.sdpa_attention.sdpa_attention_forward", "dropout", "scaling", "is_causal"
        ),
    ),
    PrivatePart(
        "transformers",
        "transformers.masking_utils.sdpa_mask",
        (ATTENTION,),
        "the mask for a registered attention function",
    ),
    PrivatePart(
        "transformers",
        "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS",
        ("sinkmodel/memories/hooks.py", "sinkmodel/memories/namm/memory.py"),
        "the attention function of a name, which a memory calls as the model would",
        check=lambda: callable(resolve("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS")["sdpa"]),
    ),
    PrivatePart(
        "transformers",
        "transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.original_inv_freq",
        ("sinkmodel/probe.py", "sinkmodel/export/gguf_file.py"),
        "the rotary frequencies of a model: `inv_freq`, `original_inv_freq` and `rope_type` of its rotary module",
        check=lambda: all(
            hasattr(checks.tiny_llama().model.rotary_emb, name)
            for name in ("inv_freq", "original_inv_freq", "rope_type")
        ),
    ),
    PrivatePart(
        "transformers",
        "transformers.models.gptj.modeling_gptj.GPTJAttention.embed_positions",
        ("sinkmodel/probe.py",),
        "the table of sines and cosines of GPT-J, which has no `inv_freq`",
        check=checks.sets("transformers.models.gptj.modeling_gptj.GPTJAttention", "embed_positions"),
    ),
    PrivatePart(
        "transformers",
        "transformers.models.llama.modeling_llama.LlamaAttention.layer_idx",
        ("sinkmodel/attention_maps.py", "sinkmodel/memories/hooks.py", "sinkmodel/memories/gemfilter.py"),
        "the number of an attention module's layer; modules that have it and `is_causal` are the attention modules",
        check=lambda: (
            checks.tiny_llama().model.layers[0].self_attn.layer_idx == 0
            and hasattr(checks.tiny_llama().model.layers[0].self_attn, "is_causal")
        ),
    ),
]
