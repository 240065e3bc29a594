"""Where things lie and how they are read and written. The only file with path strings.

Layout: contract of the released runner (models/, data/, hparams/, vectors/, generation/ below base_dir).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spilt.artifacts.losses import PROMPTS, SPLITS, TABLES
from spilt.cell import PROMPT, Cell
from spilt.errors import checked_name


class Store:
    """All paths of one base_dir."""

    KL = "kl.csv"  # in a cell's folder of losses: the multipliers of equal KL

    def __init__(self, base_dir: Path | str) -> None:
        self.base_dir = Path(base_dir)

    def model(self, name: str) -> Path:
        return self.base_dir / "models" / checked_name("model name", name)

    def models(self) -> list[str]:
        """The checkpoint folders that there are."""
        folder = self.base_dir / "models"
        return sorted(p.parent.name for p in folder.glob("*/config.json")) if folder.is_dir() else []

    @staticmethod
    def dataset_folder(cell: Cell) -> str:
        """axbench keeps one folder per concept."""
        name = checked_name("dataset", cell.dataset)
        return name if cell.concept is None else f"{name}_concept_{cell.concept}"

    def vector_folder(self, cell: Cell) -> Path:
        folder = self.base_dir / "vectors" / checked_name("model name", cell.model) / cell.method / self.dataset_folder(cell)
        return folder / cell.leaf

    def vector(self, cell: Cell, layer: int) -> Path:
        return self.vector_folder(cell) / f"layer_{layer}.pt"

    def metadata(self, cell: Cell, layer: int) -> Path:
        return self.vector_folder(cell) / f"metadata_layer_{layer}.jsonl"

    def checkpoint(self, cell: Cell, layer: int) -> Path:
        """State of a fit under way; removed when it is finished."""
        return self.vector_folder(cell) / f"layer_{layer}.unfinished.pt"

    def train_log(self, cell: Cell) -> Path:
        return self.vector_folder(cell) / "train.log"

    def generation_folder(self, cell: Cell) -> Path:
        folder = self.base_dir / "generation" / checked_name("model name", cell.model) / cell.method
        return folder / checked_name("dataset", cell.dataset) / cell.leaf

    def results(self, cell: Cell, multiplier: float) -> Path:
        """One file per multiplier; with concepts, one file for all of them."""
        if cell.concept is not None:
            return self.generation_folder(cell) / f"all_generation_results_m{float(multiplier)}.json"
        return self.generation_folder(cell) / f"m{float(multiplier)}" / f"{cell.dataset}_results.json"

    def generated(self, cell: Cell) -> list[tuple[float, Path]]:
        """(multiplier, results file) of everything that has been generated, with or without concepts, by multiplier."""
        folder, found = self.generation_folder(cell), []
        for path in [*folder.glob(f"m*/{cell.dataset}_results.json"), *folder.glob("all_generation_results_m*.json")]:
            name = path.parent.name if path.parent != folder else path.stem.removeprefix("all_generation_results_")
            try:
                found.append((float(name.removeprefix("m")), path))
            except ValueError:  # a manifest, or a folder of somebody's own: no multiplier, no results of ours
                continue
        return sorted(found)

    def variants(self, cell: Cell) -> list[Cell]:
        """The cell itself, then those beside it that have texts: of other layers, of other seeds; each with its variant as the form."""
        names = (path.name.removeprefix(f"{cell.method}_") for path in self.generation_folder(cell).parent.glob(f"{cell.leaf}@*"))
        return [cell, *(replace(cell, intervention=name) for name in sorted(names))]

    def behind_prompts(self, model: str, dataset: str) -> list[Cell]:
        """Those with texts (or scores of texts) of the unsteered model behind a prompt, each with the prompt's name as the form."""
        folder = self.generation_folder(Cell(model, dataset, PROMPT, "", ())).parent
        names = sorted(path.name.removeprefix(f"{PROMPT}_") for path in folder.glob(f"{PROMPT}_*") if path.is_dir())
        return [Cell(model, dataset, PROMPT, name, ()) for name in names if name]

    def scores(self, cell: Cell, multiplier: float) -> Path:
        """Of the texts at a multiplier, of all concepts."""
        return self.generation_folder(cell) / "scores" / f"scores_m{float(multiplier)}.csv"

    def scored(self, cell: Cell) -> list[tuple[float, Path]]:
        """(multiplier, scores file) of everything that has been evaluated, by multiplier."""
        found = []
        for path in (self.generation_folder(cell) / "scores").glob("scores_m*.csv"):
            try:
                found.append((float(path.stem.removeprefix("scores_m")), path))
            except ValueError:  # a file of somebody's own
                continue
        return sorted(found)

    def unfinished_scores(self, cell: Cell, rank: int) -> Path:
        """What a run that did not finish has measured of texts; one file per process."""
        return self.generation_folder(cell) / "scores" / f"unfinished_{rank}.jsonl"

    def judged(self) -> Path:
        """What judges have replied, to whatever run."""
        return self.base_dir / "judged"

    def unfinished(self, cell: Cell, rank: int) -> Path:
        """Texts made by a run that did not finish; one file per process, removed when the results are written."""
        return self.generation_folder(cell) / f"unfinished_{rank}.jsonl"

    def generation_log(self, cell: Cell, multiplier: float) -> Path:
        return self.generation_folder(cell) / "logs" / f"{cell.method}_{cell.intervention}_m{float(multiplier)}.log"

    def loss_root(self, model: str) -> Path:
        return self.base_dir / "vectors" / checked_name("model name", model) / "get_sft_loss"

    def loss_roots(self) -> list[Path]:
        """Those that there are, of all models."""
        return sorted((self.base_dir / "vectors").glob("*/get_sft_loss"))

    def pages(self, model: str) -> Path:
        """A folder per dataset, each with the page of its losses."""
        return self.loss_root(model) / "report"

    def index(self, model: str | None = None) -> Path:
        """The list of a model's pages, or of all."""
        return self.base_dir / "vectors" / "report.html" if model is None else self.pages(model) / "index.html"

    def loss_folder(self, cell: Cell) -> Path:
        return self.loss_root(cell.model) / cell.method / self.dataset_folder(cell) / cell.leaf

    def losses(self, cell: Cell, multiplier: float, preference_type: str, split: str) -> Path:
        name = f"{cell.intervention}_{cell.method}_m{float(multiplier)}_{preference_type}"
        return self.loss_folder(cell) / name / SPLITS[split]

    def loss_table(self, cell: Cell, split: str) -> Path:
        """All multipliers in one file."""
        return self.loss_folder(cell) / TABLES[split]

    def prompt_table(self, model: str, dataset: str, name: str, split: str) -> Path:
        """Losses behind a prompt, a baseline: a folder for each beside those of the methods."""
        folder = self.loss_root(model) / PROMPT / checked_name("dataset", dataset)
        return folder / checked_name("prompt baseline", name) / PROMPTS[split]

    def prompt_tables(self, model: str, dataset: str, split: str) -> list[Path]:
        """Those that there are."""
        return sorted((self.loss_root(model) / PROMPT / checked_name("dataset", dataset)).glob(f"*/{PROMPTS[split]}"))

    def unfinished_losses(self, cell: Cell, rank: int) -> Path:
        """Losses scored by a run that did not finish; one file per process, removed when the tables are written."""
        return self.loss_folder(cell) / f"unfinished_{rank}.jsonl"

    def unfinished_work(self, verb: str, cells: Sequence[Cell]) -> list[Path]:
        """What runs that did not finish left of a step: checkpoints of fits, or lines of texts, scores or losses."""
        if verb == "fit":
            return [path for cell in cells for layer in cell.layers if (path := self.checkpoint(cell, layer)).exists()]
        if verb == "evaluate":
            folders = [self.generation_folder(cell) / "scores" for cell in cells]
        else:
            folders = [(self.generation_folder if verb == "generate" else self.loss_folder)(cell) for cell in cells]
        return sorted({path for folder in folders for path in folder.glob("unfinished_*.jsonl")})

    def control(self, cell: Cell) -> Path:
        """Random interventions of the same output norm, per draw and multiplier."""
        return self.loss_folder(cell) / "control.csv"

    def control_texts(self, cell: Cell) -> Path:
        """How many answers show the behaviour along random interventions."""
        return self.loss_folder(cell) / "control_texts.csv"

    def relative(self, path: Path) -> str:
        """For messages and manifests: below base_dir where it is."""
        try:
            return str(path.relative_to(self.base_dir))
        except ValueError:
            return str(path)
