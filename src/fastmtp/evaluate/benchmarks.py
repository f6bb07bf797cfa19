"""The paper's seven benchmarks, fetched once with `datasets` (extra) and kept as JSONL files.

MT-Bench, NQ with and without passages and CNN/DM come from Spec-Bench's question file (Xia et al., arXiv
2401.07851), the others from their own pages on the Hugging Face hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastmtp.files import cache_directory, replacing

Row = dict[str, Any]

_SPEC_BENCH = "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"
_LIVE_CODE_BENCH = "hf://datasets/livecodebench/code_generation_lite/test6.jsonl"
# Spec-Bench's categories that are not MT-Bench's.
_OTHER = {"summarization": "cnn_dm", "qa": "nq_qa", "rag": "nq_rag", "translation": "", "math_reasoning": ""}
# Prompts of each benchmark, of which --limit takes the first; C-Eval: of each subject one.
_SUBJECTS = (
    "accountant", "advanced_mathematics", "art_studies", "basic_medicine", "business_administration",
    "chinese_language_and_literature", "civil_servant", "clinical_medicine", "college_chemistry",
    "college_economics", "college_physics", "college_programming", "computer_architecture", "computer_network",
    "discrete_mathematics", "education_science", "electrical_engineer", "environmental_impact_assessment_engineer",
    "fire_engineer", "high_school_biology", "high_school_chemistry", "high_school_chinese", "high_school_geography",
    "high_school_history", "high_school_mathematics", "high_school_physics", "high_school_politics",
    "ideological_and_moral_cultivation", "law", "legal_professional", "logic", "mao_zedong_thought", "marxism",
    "metrology_engineer", "middle_school_biology", "middle_school_chemistry", "middle_school_geography",
    "middle_school_history", "middle_school_mathematics", "middle_school_physics", "middle_school_politics",
    "modern_chinese_history", "operating_system", "physician", "plant_protection", "probability_and_statistics",
    "professional_tour_guide", "sports_science", "tax_accountant", "teacher_qualification",
    "urban_and_rural_planner", "veterinary_medicine",
)  # fmt: skip


def fetch_benchmarks() -> Path:
    """The directory with one JSONL file for each benchmark.

    Raises:
        FileNotFoundError: they are not here yet and cannot be fetched.
    """
    directory = cache_directory() / "fastmtp7"
    if not directory.is_dir():
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise FileNotFoundError(
                "the suite fastmtp7 is fetched with datasets; pip install 'fastmtp[datasets]', or give --suite DIR "
                "with a JSONL file for each benchmark"
            ) from error
        try:
            rows = {name: list(found) for name, found in _benchmarks(load_dataset).items()}
        # Whatever the library raises without a network, the remedy is the same.
        except Exception as error:
            raise FileNotFoundError(f"the suite fastmtp7 cannot be fetched: {error}; give --suite DIR") from error
        with replacing(directory) as temporary:
            temporary.mkdir()
            for name, listed in rows.items():
                lines = (json.dumps({"benchmark": name, **row}, ensure_ascii=False) + "\n" for row in listed)
                (temporary / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return directory


def _benchmarks(load: Any) -> Mapping[str, Iterable[Row]]:
    """Rows with `id`, `turns` and, where there is one, `answer`, by benchmark."""
    asked = list(load("json", data_files=_SPEC_BENCH, split="train"))
    named = [(_OTHER.get(row["category"], "mt_bench"), row) for row in asked]
    spec_bench = {
        name: [{"id": f"{name}-{row['question_id']}", "turns": row["turns"]} for of, row in named if of == name]
        for name in ("mt_bench", "nq_rag", "nq_qa", "cnn_dm")
    }
    code = load("json", data_files=_LIVE_CODE_BENCH, split="train")
    mathematics = load("HuggingFaceH4/MATH-500", split="test")
    return spec_bench | {
        "livecodebench": _numbered("livecodebench", ({"turns": [row["question_content"]]} for row in code)),
        "math_500": _numbered(
            "math_500", ({"turns": [row["problem"]], "answer": row["answer"]} for row in mathematics)
        ),
        "c_eval": _numbered("c_eval", (_c_eval(load, subject) for subject in _SUBJECTS)),
    }


def _numbered(name: str, rows: Iterable[Row]) -> Iterator[Row]:
    return ({"id": f"{name}-{number:03}", **row} for number, row in enumerate(rows))


def _c_eval(load: Any, subject: str) -> Row:
    row = load("ceval/ceval-exam", subject, split="val")[0]
    choices = "\n".join(f"{letter}. {row[letter]}" for letter in "ABCD")
    return {"turns": [f"请选出这道单项选择题的正确答案。\n{row['question']}\n{choices}"], "answer": row["answer"]}
