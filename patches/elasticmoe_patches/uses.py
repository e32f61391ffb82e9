"""Which attributes of SGLang's classes and modules this package reads, calls, sets or overrides, besides what it hooks.

Preflight checks for every one that the installed SGLang has it: a hook may fit while what it works with was renamed.
`tests/unit/test_declared_uses.py` finds uses that are not declared. What is imported from SGLang by name is not listed:
the import statements are read from the source.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import elasticmoe_patches
from elasticmoe_sglang import SUPPORTED_SGLANGS

UseKind = Literal["read", "call", "set", "override", "import"]

_MARKS: dict[str, UseKind] = {"()": "call", "=": "set", "!": "override"}


@dataclass(frozen=True, kw_only=True)
class Use:
    """One attribute of SGLang's that this package depends on.

    Attributes:
        owner: dotted path of the class or module that has it. name: the attribute.
        versions: the supported versions in which it is used.
    """

    owner: str
    name: str
    kind: UseKind
    versions: tuple[str, ...] = SUPPORTED_SGLANGS

    @property
    def target(self) -> str:
        return f"{self.owner}.{self.name}"


def _of(owner: str, names: str, *, versions: tuple[str, ...] = SUPPORTED_SGLANGS) -> tuple[Use, ...]:
    """Uses of one class under `sglang.srt`: `name` is read, `name()` called, `name=` set, `name!` overridden."""
    return tuple(_use(f"sglang.srt.{owner}", word, versions) for word in names.split())


def _use(owner: str, word: str, versions: tuple[str, ...]) -> Use:
    for mark, kind in _MARKS.items():
        if word.endswith(mark):
            return Use(owner=owner, name=word.removesuffix(mark), kind=kind, versions=versions)
    return Use(owner=owner, name=word, kind="read", versions=versions)


_OLD, _NEW = ("0.5.21",), ("0.5.23",)

USES: tuple[Use, ...] = (
    # -- the scheduler and its parts
    *_of(
        "managers.scheduler.Scheduler",
        "_add_request_to_queue() abort_request() handle_generate_request() process_batch_result() flush_cache() "
        "process_input_requests() is_fully_idle() _request_dispatcher= batch_result_processor chunked_prefill_size "
        "chunked_req= cur_batch_for_debug= device_module disable_radix_cache enable_overlap grammar_manager "
        "hisparse_coordinator ipc_channels is_mixed_chunk last_batch= max_req_input_len= max_req_len= "
        "max_running_requests= max_total_num_tokens= model_config page_size req_to_token_pool request_receiver "
        "result_queue running_batch= token_to_kv_pool_allocator tp_worker tree_cache waiting_queue= invariant_checker "
        "pool_stats_observer load_inquirer kv_events_publisher _prefill_decode_interval_remaining= "
        "schedule_stream forward_stream future_map",
    ),
    *_of(
        "managers.scheduler_components.ipc_channels.SchedulerIpcChannels",
        "recv_from_tokenizer recv_from_rpc send_to_detokenizer send_to_tokenizer send_metrics_from_scheduler",
    ),
    *_of("managers.scheduler_components.output_sender.SenderWrapper", "socket= send_output()"),
    *_of(
        "managers.scheduler_components.request_receiver.SchedulerRequestReceiver",
        "_pull_raw_reqs() _split_work_and_control_reqs() unwrap_pickle_wrapper()",
    ),
    *_of(
        "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor",
        "_maybe_update_reasoning_tokens()",
    ),
    *_of("constrained.grammar_manager.GrammarManager", "grammar_queue"),
    *_of("constrained.base_grammar_backend.BaseGrammarObject", "accept_token()"),
    *_of("managers.tp_worker.TpModelWorker", "model_runner random_seed"),
    *_of(
        "model_executor.model_runner.ModelRunner",
        "decode_cuda_graph_runner dtype max_running_requests max_total_num_tokens= memory_pool_config model "
        "spec_algorithm token_to_kv_pool req_to_token_pool",
    ),
    *_of("model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner", "capture_bs"),
    *_of("model_executor.pool_configurator.MemoryPoolConfig", "max_total_num_tokens="),
    *_of("managers.utils.GenerationBatchResult", "copy_done"),
    *_of("managers.schedule_batch.NextBatchPlan", "batch_to_run= running_batch="),
    *_of("managers.overlap_utils.FutureMap", "stash_bonus_tokens()"),
    *_of(
        "managers.schedule_batch.ScheduleBatch",
        "can_run_decode_cuda_graph can_run_dp_draft_cuda_graph dp_spec_prefill_coordination_applied enable_overlap "
        "forward_mode global_num_tokens global_num_tokens_for_logprob out_cache_loc= reqs device extend_lens "
        "input_ids= is_empty() merge_batch() orig_seq_lens= prefill_input_ids_cpu= req_pool_indices "
        "sampling_info seq_lens= seq_lens_cpu= seq_lens_sum=",
    ),
    # -- requests
    *_of(
        "managers.schedule_batch.Req",
        "finished() grammar is_retracted= kv logprob= origin_input_ids output_ids= retracted_stain= return_logprob rid "
        "sampling_params seqlen to_finish",
    ),
    *_of("managers.schedule_batch.Req", "prefix_indices", versions=_OLD),
    # What moves with a request (worker/migration.py).
    *_of(
        "managers.schedule_batch.Req",
        "send_token_offset= send_decode_id_offset= send_output_token_logprobs_offset= input_logprob_sent= "
        "hidden_states= sampling_mask_rows= customized_info= reasoning_tokens= _is_reasoning_over= "
        "_think_end_match_len= cached_tokens= cached_tokens_device= cached_tokens_host= cached_tokens_storage= "
        "_cache_breakdown_computed= retraction_count= weight_version_events= spec_verify_ct=",
    ),
    *_of(
        "managers.schedule_batch.ReqKvInfo",
        "cache_protected_len holds_kv kv_allocated_len= kv_committed_len= req_pool_idx",
    ),
    *_of(
        "managers.schedule_batch.ReqLogprob",
        "input_token_logprobs_val= input_token_logprobs_idx= input_top_logprobs_val= input_top_logprobs_idx= "
        "input_token_ids_logprobs_val= input_token_ids_logprobs_idx= output_token_logprobs_val= "
        "output_token_logprobs_idx= output_top_logprobs_val= output_top_logprobs_idx= output_token_ids_logprobs_val= "
        "output_token_ids_logprobs_idx=",
    ),
    *_of("sampling.sampling_params.SamplingParams", "max_new_tokens normalize() sampling_seed top_k"),
    *_of("sampling.sampling_batch_info.SamplingBatchInfo", "sampling_seed= penalizer_orchestrator"),
    *_of(
        "managers.io_struct.TokenizedGenerateReqInput",
        "cache_salt extra_key input_ids return_logprob routed_dp_rank= sampling_params= stream time_stats= "
        "wrap_pickle_fields() unwrap_pickle_fields() rid",
    ),
    *_of(
        "managers.io_struct.GenerateReqInput",
        "is_single rid routed_dp_rank sampling_params stream",
    ),
    *_of("managers.io_struct.AbortReq", "abort_all finished_reason rid"),
    *_of("managers.io_struct.BatchStrOutput", "completion_tokens dp_ranks= finished_reasons rids"),
    *_of("managers.io_struct.ScaleElasticEPReqInput", "new_ep_size"),
    # -- penalties
    *_of("sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator", "device is_required= penalizers"),
    *_of("sampling.penaltylib.orchestrator._BatchedPenalizer", "is_prepared()"),
    *_of(
        "sampling.penaltylib.frequency_penalty.BatchedFrequencyPenalizer",
        "cumulated_frequency_penalties frequency_penalties",
    ),
    *_of(
        "sampling.penaltylib.presence_penalty.BatchedPresencePenalizer",
        "cumulated_presence_penalties presence_penalties",
    ),
    *_of(
        "sampling.penaltylib.repetition_penalty.BatchedRepetitionPenalizer",
        "cumulated_repetition_penalties repetition_penalties",
    ),
    *_of("sampling.penaltylib.min_new_tokens.BatchedMinNewTokensPenalizer", "len_output_tokens"),
    # -- KV caches
    *_of(
        "mem_cache.unified_radix_cache.UnifiedRadixCache",
        "evict() evictable_size() insert() match_prefix() tree_core",
    ),
    *_of("mem_cache.unified_radix_cache.UnifiedRadixCache", "insert_req() is_chunk_cache()", versions=_OLD),
    *_of(
        "mem_cache.unified_radix_cache.UnifiedRadixCache",
        "checkpoint() path_device_indices() supports_prefix_sharing() token_to_kv_pool_allocator",
        versions=_NEW,
    ),
    *_of("mem_cache.unified_cache.unified_tree_core.UnifiedTreeCore", "root_node"),
    *_of("mem_cache.unified_cache.unified_tree_core.UnifiedTreeNode", "children component_data"),
    *_of("mem_cache.unified_cache.unified_tree_core.ComponentData", "value"),
    *_of("mem_cache.base_prefix_cache.MatchResult", "device_indices", versions=_OLD),
    *_of("mem_cache.base_prefix_cache.MatchResult", "device_prefix_len last_device_node", versions=_NEW),
    *_of("mem_cache.base_prefix_cache.EvictResult", "num_tokens_evicted"),
    *_of(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator",
        "alloc() alloc_decode! alloc_extend! available_size() device free() free_group free_pages= "
        "get_kvcache() merge_and_sort_free() num_pages= page_size size=",
    ),
    *_of("mem_cache.allocator.token.TokenToKVPoolAllocator", "free_pages= merge_and_sort_free() page_size size="),
    *_of(
        "mem_cache.memory_pool.MHATokenToKVPool",
        "_create_buffers_normal! _init_data_ptrs_and_strides! _slot_move_pointer_buffers() _store_kv_layer! alt_stream "
        "data_strides= device device_module dtype get_key_buffer() get_kv_size_bytes! get_value_buffer() k_buffer= "
        "kv_cache_layout layer_num row_dim set_kv_buffer() size= store_dtype v_buffer= v_row_dim",
    ),
    *_of("mem_cache.memory_pool.MHATokenToKVPool", "_build_kv_buffer_descs!", versions=_NEW),
    *_of(
        "mem_cache.memory_pool.MLATokenToKVPool",
        "_create_buffers! get_kv_size_bytes! kv_buffer= layer_num size= get_key_buffer() get_value_buffer() "
        "set_kv_buffer()",
    ),
    *_of(
        "hardware_backend.npu.memory_pool_npu.NPUMHATokenToKVPool",
        "_create_buffers! get_kv_size_bytes! k_buffer= v_buffer= page_size layer_num size= use_fia",
    ),
    *_of(
        "hardware_backend.npu.memory_pool_npu.NPUMLATokenToKVPool",
        "get_kv_size_bytes! k_buffer= v_buffer= page_size layer_num size=",
    ),
    *_of("mem_cache.memory_pool.ReqToTokenPool", "req_to_token"),
    *_of(
        "mem_cache.kv_cache_configurator.KVCacheConfigurator",
        "device kv_cache_dtype layer_info model_config pool_page_size use_mla_backend",
    ),
    *_of(
        "model_executor.model_runner_components.layer_setup.ModelLayerInfo",
        "end_layer num_effective_layers start_layer",
    ),
    *_of(
        "configs.model_config.ModelConfig",
        "context_len dtype get_num_kv_heads() head_dim hf_config kv_lora_rank model_path qk_rope_head_dim revision "
        "vocab_size",
    ),
    *_of("configs.load_config.LoadConfig", "load_format"),
    *_of("configs.device_config.DeviceConfig", "device"),
    # -- the data-parallel controller
    *_of(
        "managers.data_parallel_controller.DataParallelController",
        "_active_count_cache= _active_workers= _refresh_active_workers() _request_dispatcher= context dp_active= "
        "dp_budget max_dp_size max_req_input_len= max_total_num_tokens= recv_from_tokenizer round_robin_counter= "
        "send_control_message() soft_watchdog startup_time= status= workers",
    ),
    *_of("managers.data_parallel_controller.DataParallelController", "_record_scheduler_init_infos()", versions=_NEW),
    *_of("managers.data_parallel_controller.DPBudget", "total_requests= total_tokens="),
    *_of("utils.watchdog.Watchdog", "feed()"),
    # -- the main process
    *_of(
        "managers.tokenizer_manager.TokenizerManager",
        "_dispatch_to_scheduler() _handle_abort_req() _result_dispatcher= abort_request() auto_create_handle_loop() "
        "configure_logging() enable_metrics enable_trace event_loop gracefully_exit= load_snapshot_reader rid_to_state "
        "served_model_name server_status= server_args",
    ),
    *_of(
        "managers.tokenizer_manager.ReqState",
        "abort_sent dispatched finished obj output_ids time_stats",
    ),
    *_of("observability.req_time_stats.APIServerReqTimeStats", "created_time"),
    *_of(
        "managers.load_snapshot.LoadSnapshot",
        "max_running_requests max_total_num_tokens num_running_reqs num_used_tokens num_waiting_reqs",
    ),
    *_of("managers.communicator.FanOutCommunicator", "_result_event _result_fan_out= _result_values set_fan_out()"),
    *_of("utils.watchdog.SubprocessWatchdog", "_names _processes"),
    *_of("entrypoints.engine.Engine", "loop tokenizer_manager"),
    *_of(
        "managers.detokenizer_manager.DetokenizerManager",
        "_request_dispatcher= init_ipc_channels! init_request_dispatcher!",
    ),
    # -- arguments; the published configuration (`get_exec()`, `get_schedule()`) has the same names
    *_of(
        "server_args.ServerArgs",
        "attention_backend= chunked_prefill_size disable_hybrid_swa_memory= dp_size dtype= elastic_ep_backend= "
        "enable_deterministic_inference enable_dp_attention log_level max_total_tokens= mem_fraction_static model_path "
        "moe_runner_backend= nccl_port nnodes page_size pp_size sampling_backend tp_size",
    ),
    *_of(
        "server_args.PortArgs",
        "detokenizer_ipc_name init_new() instance_id= nccl_port= scheduler_input_ipc_name tokenizer_ipc_name",
    ),
    *_of("runtime_context.ParallelContext", "attn_dcp_size attn_tp_size"),
    *_of("speculative.spec_info.SpeculativeAlgorithm", "is_none()"),
    *_of("runtime_context._ConfigBag", "override()", versions=_NEW),
    # -- ranks, batches
    *_of("distributed.parallel_state.GroupCoordinator", "device_group rank_in_group world_size"),
    *_of(
        "managers.scheduler_components.dp_attn.MLPSyncBatchInfo",
        "_get_fallback_tensor() _get_local_tensor() can_run_decode_cuda_graph= can_run_draft_cuda_graph= "
        "can_run_prefill_cuda_graph= cp_size dp_cooperation_info= global_num_tokens= global_num_tokens_for_logprob= "
        "is_extend_in_batch= prefill_cuda_graph_max_prefix_len= tp0_info_cpu= tp_size num_tokens "
        "num_tokens_for_logprob local_can_run_tbo local_forward_mode",
    ),
    *_of("managers.scheduler_components.dp_attn.MLPSyncBatchInfo", "dp_size", versions=_OLD),
    *_of(
        "managers.scheduler_components.dp_attn.MLPSyncBatchInfo",
        "any_health_check= attention_pairs global_attention_pairs= is_health_check num_dp_ranks sync_wait_seconds=",
        versions=_NEW,
    ),
    *_of(
        "model_executor.forward_batch_info.ForwardBatch",
        "can_run_decode_cuda_graph= can_run_dp_draft_cuda_graph= dp_spec_prefill_coordination_applied= forward_mode "
        "global_num_tokens_cpu= global_num_tokens_for_logprob_cpu= global_num_tokens_for_logprob_gpu= "
        "global_num_tokens_gpu= original_global_num_tokens_cpu= spec_info",
    ),
    *_of("model_executor.forward_batch_info.ForwardMode", "is_extend()"),
    # -- layers
    *_of(
        "layers.moe.fused_moe_triton.layer.FusedMoE",
        "dispatcher moe_ep_rank= moe_ep_size= moe_runner_config top_k num_experts",
    ),
    *_of("layers.moe.token_dispatcher.standard.StandardDispatcher", "local_expert_mapping="),
    *_of("layers.moe.token_dispatcher.standard.StandardDispatchOutput", "hidden_states topk_output"),
    *_of("layers.moe.topk.StandardTopKOutput", "topk_ids"),
    *_of("layers.moe.token_dispatcher.ascend_tp.AscendTPDispatcher", "num_experts="),
    *_of(
        "layers.moe.moe_runner.ascend.AscendRunnerInput",
        "expert_tokens group_list_type hidden_states hidden_states_scale",
    ),
    *_of("layers.moe.moe_runner.ascend.AscendQuantInfo", "w13_weight w2_weight"),
    *_of("layers.moe.moe_runner.base.MoeRunnerCore", "config run!"),
    *_of(
        "layers.moe.moe_runner.base.MoeRunnerConfig",
        "activation apply_router_weight_on_input gemm1_alpha gemm1_clamp_limit is_gated layer num_experts "
        "routed_scaling_factor swiglu_limit",
    ),
    *_of("layers.quantization.unquant.UnquantizedFusedMoEMethod", "moe_runner_config= with_bias="),
    *_of("layers.quantization.fp8.Fp8MoEMethod", "moe_runner_config= with_bias="),
    *_of("layers.quantization.fp8.Fp8LinearMethod", "apply() weight_block_size"),
    *_of("layers.linear.LinearBase", "quant_method"),
    *_of(
        "layers.attention.base_attn_backend.AttentionBackend",
        "forward_decode! forward_extend! get_cuda_graph_seq_len_fill_value! init_forward_metadata! support_triton!",
    ),
    *_of(
        "layers.radix_attention.RadixAttention",
        "attn_type head_dim is_cross_attention logit_cap sliding_window_size",
    ),
    # -- loading, platform
    *_of(
        "model_loader.loader.DefaultModelLoader",
        "_prepare_weights! load_config load_model! postprocess_weights()",
    ),
    *_of(
        "platforms.interface.SRTPlatform",
        "apply_server_args_defaults! get_compile_backend! get_default_attention_backend! get_dispatch_key_name! "
        "get_paged_allocator_cls! init_backend!",
    ),
    *_of("platforms.interface.SRTPlatform", "get_mha_kv_pool_cls! get_mla_kv_pool_cls!", versions=_OLD),
    *_of("platforms.interface.SRTPlatform", "get_kv_pool_cls!", versions=_NEW),
    *_of("platforms.cpu.CpuDeviceMixin", "get_device! get_torch_profiler_activity! get_torch_profiler_activity_str!"),
)


def declared(version: str | None) -> Iterator[Use]:
    """Every use in this version: the table, and what is imported."""
    yield from (use for use in USES if version in use.versions)
    yield from (use for use in imports() if version in use.versions)


@cache
def imports() -> tuple[Use, ...]:
    """What the import statements of this package name in SGLang, and attributes read from what they bring in."""
    root = Path(elasticmoe_patches.__file__).parent
    found: dict[tuple[str, str, tuple[str, ...]], Use] = {}
    for path in sorted(root.rglob("*.py")):
        stem = path.stem.removeprefix("v").replace("_", ".")
        versions = (stem,) if stem in SUPPORTED_SGLANGS else SUPPORTED_SGLANGS
        for owner, name in _imported(ast.parse(path.read_text(encoding="utf-8"))):
            use = Use(owner=owner, name=name, kind="import", versions=versions)
            found.setdefault((owner, name, versions), use)
    return tuple(found.values())


def _imported(tree: ast.Module) -> Iterable[tuple[str, str]]:
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "sglang":
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.module, alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            yield names[node.value.id], node.attr
