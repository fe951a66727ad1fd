"""What settings of other trainers are called here: those of transformers, TRL, ms-swift, LLaMA-Factory, LLaVA, verl."""

from __future__ import annotations

from collections.abc import Iterable

CALLED_HERE = {
    "answer_key": "answer_field",
    "attn_implementation": "attn_impl flash_attn use_flash_attn use_flash_attention_2 flash_attention",
    "batch_size": """per_device_train_batch_size per_gpu_train_batch_size per_device_batch_size train_batch_size
        micro_batch_size train_micro_batch_size_per_gpu batch bs""",
    "beta": "kl_coef kl_loss_coef init_kl_coef kl_beta kl_coeff",
    "bf16": "torch_dtype dtype compute_dtype precision mixed_precision bfloat16 use_bf16",
    "deterministic": "full_determinism use_deterministic deterministic_mode",
    "device": "device_map gpu gpus cuda",
    "distributed": "deepspeed deepspeed_config zero_stage fsdp fsdp_config use_fsdp ddp ddp_backend strategy",
    "epsilon": "clip_range cliprange clip_ratio clip_ratio_low epsilon_low",
    "epsilon_high": "clip_ratio_high cliprange_high",
    "eval_steps": "eval_strategy evaluation_strategy eval_interval eval_freq test_freq val_check_interval",
    "freeze": """freeze_vit freeze_llm freeze_aligner freeze_vision_tower freeze_multi_modal_projector freeze_projector
        freeze_language_model freeze_backbone freeze_parameters tune_mm_mlp_adapter trainable_parameters""",
    "from": "source_format data_format dataset_format input_format",
    "gradient_accumulation_steps": """gradient_accumulation grad_accum grad_accumulation grad_accum_steps
        accumulation_steps accumulate_grad_batches""",
    "gradient_checkpointing": """gradient_checkpointing_enable use_gradient_checkpointing gradient_checkpointing_kwargs
        activation_checkpointing enable_gradient_checkpointing grad_checkpointing disable_gradient_checkpointing
        vit_gradient_checkpointing""",
    "grpo_output_dir": "output_dir output output_path out_dir save_dir save_path run_dir",
    "image_base_path": """image_folder image_dir image_path image_root images images_dir images_folder media_dir
        media_root media_folder data_root image_base_dir""",
    "image_path": "image images image_file img picture video video_path video_file",
    "keep_best": "load_best_model_at_end save_best",
    "learning_rate": "lr base_lr peak_lr",
    "logging_steps": "logging_interval logging_strategy log_interval log_steps log_every",
    "lora_alpha": "peft_lora_alpha alpha",
    "lora_r": "lora_rank lora_dim rank peft_lora_r r",
    "lora_targets": "lora_target target_modules lora_target_modules lora_modules peft_target_modules target_regex",
    "lr_scheduler_type": "lr_scheduler scheduler lr_decay_style lr_schedule scheduler_type",
    "max_grad_norm": "clip_grad grad_clip gradient_clipping gradient_clip_val max_norm grad_norm",
    "max_length": """max_seq_length max_seq_len seq_length seq_len sequence_len sequence_length cutoff_len
        model_max_length max_prompt_length max_len block_size""",
    "max_new_tokens": "max_completion_length max_response_length response_length max_gen_len",
    "max_pixels": "image_max_pixels max_image_pixels",
    "max_steps": "max_train_steps num_train_steps total_training_steps num_steps train_steps train_iters",
    "max_tokens_per_row": "packing_length max_tokens_per_gpu ppo_max_token_len_per_gpu max_packed_length",
    "min_pixels": "image_min_pixels min_image_pixels",
    "model_name": "model model_name_or_path model_path model_id base_model pretrained_model_name_or_path",
    "model_path": """model model_name model_name_or_path model_id base_model checkpoint ckpt ckpt_dir lora_path
        adapter adapters adapter_path adapter_name_or_path""",
    "modules_to_save": "additional_target modules_to_train",
    "num_epochs": "num_train_epochs epochs epoch n_epochs max_epochs total_epochs train_epochs",
    "num_generations": "num_return_sequences group_size rollout_n n_samples n_samples_per_prompt",
    "num_iterations": "ppo_epochs num_ppo_epochs mu",
    "num_workers": """dataloader_num_workers dataset_num_proc num_proc preprocessing_num_workers workers
        dataloader_num_proc dataloader_workers""",
    "output_json": "output out output_file result_path save_path",
    "overwrite": "overwrite_output_dir force force_overwrite",
    "part_learning_rates": "vit_lr vision_lr mm_projector_lr mm_vision_tower_lr aligner_lr projector_lr",
    "process_timeout": "ddp_timeout dist_timeout nccl_timeout",
    "quantization": """load_in_4bit load_in_8bit quantization_bit quant_bits quant_method bits use_qlora qlora
        quantization_method bnb_4bit_quant_type""",
    "question": "prompt query text instruction",
    "report_to": "wandb use_wandb tensorboard use_tensorboard trackio tracker trackers log_with loggers",
    "resume": "resume_from resume_ckpt load_checkpoint from_checkpoint auto_resume",
    "reward": "reward_funcs reward_func reward_fn reward_function reward_model custom_reward_function",
    "rollout_batch_size": "max_num_seqs generation_batch_size rollout_batch",
    "save_steps": "save_strategy save_interval save_freq save_every checkpoint_steps checkpointing_steps",
    "save_total_limit": "keep_last_n max_checkpoints keep_checkpoint_max max_ckpt_to_keep",
    "seed": "data_seed random_seed train_seed manual_seed",
    "sft_checkpoint": "ref_model reference_model ref_model_name_or_path sft_model actor_model",
    "sft_output_dir": "output_dir output output_path out_dir save_dir save_path run_dir",
    "stage": "train_stage rlhf_type",
    "surrogate": "loss_type policy_loss importance_sampling_level",
    "train_data": """dataset datasets dataset_name dataset_path data data_path data_file train_file train_files
        train_dataset train_data_path training_data""",
    "use_dora": "dora lora_dora",
    "use_lora": """lora use_peft peft lora_enable enable_lora train_type tuner_type sft_type finetuning_type
        peft_type""",
    "use_rslora": "rslora",
    "val_data": """val_dataset eval_dataset validation_file eval_file val_file val_files test_file eval_data
        eval_data_path val_data_path validation_data test_data""",
    "warmup_ratio": "warmup_steps num_warmup_steps lr_warmup_steps lr_warmup_fraction warmup_fraction warmup",
    "weight_decay": "wd adam_weight_decay",
}
"""Names here, and what the same is called elsewhere."""

NOT_HERE = {
    "torchrun says how many processes train, see docs/scaling.md": """accelerate_config local_rank nproc_per_node
        n_gpus_per_node n_gpus nnodes num_gpus num_processes world_size ddp_find_unused_parameters""",
    "models are shared out by --distributed fsdp alone; see also --use_lora, --quantization and --memory_efficient": """
        tensor_parallel_size tensor_model_parallel_size pipeline_parallel_size sequence_parallel_size
        context_parallel_size tp pp offload cpu_offload optimizer_offload offload_optimizer""",
    "evaluation computes as training does; use --fp16": "half float16 use_fp16 fp16_full_eval",
    "the built-in engine samples, or --vllm_servers do": """use_vllm vllm vllm_mode vllm_gpu_memory_utilization
        gpu_memory_utilization vllm_server_host vllm_server_port vllm_tensor_parallel_size use_sglang rollout_engine
        rollout_backend""",
    "metrics go to metrics.jsonl in the run folder and where --report_to says, a project by WANDB_PROJECT": """
        wandb_project wandb_entity wandb_name wandb_run_name run_name swanlab use_swanlab logging_dir log_dir
        tensorboard_dir project_name experiment_name plot_loss logging_first_step disable_tqdm log_level""",
    "code from a model folder is never run": "trust_remote_code",
    "samples are always packed into rows, see --max_tokens_per_row": """packing neat_packing padding_free packing_type
        group_by_length pad_to_multiple_of dynamic_batching use_dynamic_bsz remove_padding use_remove_padding""",
    "the chat template comes from the model folder": """template chat_template template_type conv_version
        conversation_template version prompt_template system_prompt system""",
    "the optimizer is AdamW with fixed betas, see --optim": """optimizer beta1 beta2 adam_beta1 adam_beta2 adam_epsilon
        optim_args lr_scheduler_kwargs galore use_galore""",
    "what it sets is done without a flag": """do_train do_eval do_predict remove_unused_columns dataloader_pin_memory
        dataloader_prefetch_factor dataloader_drop_last dataloader_persistent_workers lazy_preprocess streaming
        preprocessing_batch_size overwrite_cache skip_memory_metrics tf32 use_fast_tokenizer use_cache is_multimodal
        mm_use_im_start_end dataset_text_field dataset_kwargs assistant_only_loss train_on_inputs""",
    "a checkpoint always holds what a run needs to go on": "save_only_model",
    "the best is that of eval/loss or eval/accuracy, kept by --keep_best, and no run stops early": """
        metric_for_best_model greater_is_better early_stopping early_stopping_patience""",
    "evaluation packs rows as training does": """per_device_eval_batch_size per_gpu_eval_batch_size eval_batch_size
        val_batch_size eval_accumulation_steps""",
    "nothing is uploaded; see `hf upload`": "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo",
    "the hub's own variables hold: HF_HOME, HF_TOKEN, HF_ENDPOINT": "cache_dir hf_token token use_auth_token",
    "it comes from the model folder": """tokenizer_name tokenizer_name_or_path tokenizer processor_name config_name
        model_type model_revision revision vision_tower mm_projector_type image_processor""",
    "leave it out": """label_smoothing label_smoothing_factor neftune_noise_alpha lora_bias bias init_lora_weights
        rope_scaling use_liger_kernel enable_liger_kernel liger_kernel use_liger use_unsloth shift_attn
        auto_find_batch_size check_model use_swift_lora loss_scale""",
    "every sample of the file is used; write a file with those you want": """max_samples max_train_samples
        max_eval_samples num_samples dataset_sample val_size split_dataset_ratio eval_size test_size mix_strategy
        val_split""",
}
"""Why there is no such setting, and the settings."""


def called_here(name: str, known: Iterable[str]) -> str:
    """A hint such as ` Here it is --batch_size.` for a name of another trainer's, or an empty string.

    `known` are the names that may stand in its place: flags, with their dashes, or keys.
    """
    own = name.lstrip("-").rpartition(".")[2].lower().replace("-", "_")
    here = [other for other in known if own in CALLED_HERE.get(other.lstrip("-"), "").split()]
    if here:
        return f" Here it is {' or '.join(here)}."
    return "".join(f" There is none here: {why}." for why, names in NOT_HERE.items() if own in names.split())
