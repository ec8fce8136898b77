"""Generated from proto_vendor/: which module holds which snapshot, a dialect's oldest first."""

MODULES = {
    "sglang.api": {
        "0.5.22": "sglang_api__0_5_22",
        "0.5.23": "sglang_api__0_5_23",
    },
    "sglang.runtime": {
        "0.5.16": "sglang_runtime__0_5_16",
        "0.5.19": "sglang_runtime__0_5_19",
        "0.5.20": "sglang_runtime__0_5_20",
        "0.5.21": "sglang_runtime__0_5_21",
        "0.5.22": "sglang_runtime__0_5_22",
        "0.5.23": "sglang_runtime__0_5_23",
    },
    "sglang.scheduler": {
        "intree-0.5.3": "sglang_scheduler__intree_0_5_3",
        "intree-0.5.3.post2": "sglang_scheduler__intree_0_5_3_post2",
        "intree-0.5.8": "sglang_scheduler__intree_0_5_8",
        "smg-0.3.2": "sglang_scheduler__smg_0_3_2",
        "smg-0.4.4": "sglang_scheduler__smg_0_4_4",
        "smg-0.4.6": "sglang_scheduler__smg_0_4_6",
        "smg-0.4.14": "sglang_scheduler__smg_0_4_14",
        "smg-0.4.19": "sglang_scheduler__smg_0_4_19",
        "smg-0.4.28": "sglang_scheduler__smg_0_4_28",
    },
    "vllm.engine": {
        "intree-0.14.0": "vllm_engine__intree_0_14_0",
        "smg-0.4.4": "vllm_engine__smg_0_4_4",
        "smg-0.4.8": "vllm_engine__smg_0_4_8",
        "smg-0.4.11": "vllm_engine__smg_0_4_11",
        "smg-0.4.13": "vllm_engine__smg_0_4_13",
        "smg-0.4.20": "vllm_engine__smg_0_4_20",
        "smg-0.4.22": "vllm_engine__smg_0_4_22",
        "smg-0.4.28": "vllm_engine__smg_0_4_28",
    },
    "vllm.inference": {
        "0.25.1": "vllm_inference__0_25_1",
        "0.26.0": "vllm_inference__0_26_0",
        "0.27.1": "vllm_inference__0_27_1",
        "0.28.0": "vllm_inference__0_28_0",
        "0.29.0": "vllm_inference__0_29_0",
        "0.30.0": "vllm_inference__0_30_0",
        "0.31.0": "vllm_inference__0_31_0",
        "0.32.0": "vllm_inference__0_32_0",
        "0.33.0": "vllm_inference__0_33_0",
    },
}
