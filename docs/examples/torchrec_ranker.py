"""A TorchRec ranker by IDs, and the same ranker with EM3's parts in its graph, trained on the same simulated clicks.

    torchrun --nproc_per_node 2 docs/examples/torchrec_ranker.py

Nothing here reads a config or writes a run folder: this is a training loop of its own that borrows four modules. Shape
letters: B rows, U distinct target items, V distinct history items, N history positions, I items, T tokens, D width.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn import functional
from torchmetrics.functional.classification import binary_auroc
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.tensor_pool import TensorPoolSharder
from torchrec.distributed.types import ObjectPoolShardingPlan, ObjectPoolShardingType
from torchrec.modules.mlp import MLP
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.alignment.contrast import ContentIdContrast, ContrastOptions
from torchrec_em3.components.content_bank import ContentBank
from torchrec_em3.components.distinct import distinct
from torchrec_em3.components.interest import target_attention
from torchrec_em3.components.interfaces import HistoryItems
from torchrec_em3.components.towers.qformer import FusionQFormer, FusionQFormerOptions

USERS, ITEMS, NEW_ITEMS = 1_000, 2_000, 200
WIDTH, TOKEN_WIDTH, TOKENS, HISTORY = 16, 32, 4, 10
ROWS, STEPS = 1_024, 200
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


class IdRanker(nn.Module):
    """What may stand in your code now: pooled embeddings of user, target and history, and an MLP over them."""

    def __init__(self, more: int = 0) -> None:
        super().__init__()
        user = EmbeddingBagConfig(name="user", num_embeddings=USERS, embedding_dim=WIDTH, feature_names=["user"])
        item = EmbeddingBagConfig(
            name="item",
            num_embeddings=ITEMS,
            embedding_dim=WIDTH,
            feature_names=["target", "history"],
            pooling=PoolingType.MEAN,
        )
        self.tables = EmbeddingBagCollection(tables=[user, item], device=torch.device("meta"))
        self.over = nn.Sequential(MLP(3 * WIDTH + more, [64]), nn.Linear(64, 1))

    def forward(self, sparse: KeyedJaggedTensor, label_B: Tensor, *more: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, logits_B, and the ID embeddings of the targets, id_BD."""
        pooled = self.tables(sparse)
        logit_B = self.over(torch.cat([pooled.values(), *more], dim=1)).squeeze(1)
        return functional.binary_cross_entropy_with_logits(logit_B, label_B), logit_B, pooled["target"]


class ContentRanker(nn.Module):
    """The same ranker; it also reads what the target is, and what the items of the history are."""

    def __init__(self, tokens_ITD: Tensor) -> None:
        super().__init__()
        self.ranker = IdRanker(more=2 * WIDTH)
        self.tower = FusionQFormer(FusionQFormerOptions(), {"text": TOKEN_WIDTH}, {"text": TOKENS}, WIDTH)
        self.bank = ContentBank(ITEMS, WIDTH, torch.device("meta"))
        self.interest = target_attention(WIDTH, hidden=())
        self.contrast = ContentIdContrast(ContrastOptions(), WIDTH)
        self.tokens_ITD = tokens_ITD
        self.step = 0

    def forward(self, sparse: KeyedJaggedTensor, label_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `IdRanker` does. Collective, as a sharded module is: every rank calls it equally often."""
        # The tower runs once for each distinct target, with gradient: so the ranking loss trains it.
        item_U, row_B = distinct(sparse["target"].values(), ITEMS)
        tokens_UTD = self.tokens_ITD[item_U]
        valid_UT = torch.ones(tokens_UTD.shape[:2], dtype=torch.bool, device=DEVICE)
        content_UD = self.tower({"text": ModalityTokens(tokens_UTD, valid_UT)})
        content_BD = content_UD[row_B]

        # The history's content comes from the bank: what the tower made of an item when it was last a target.
        item_V, row_N = distinct(sparse["history"].values(), ITEMS)
        content_VD, step_V = self.bank.read(item_V)
        history = HistoryItems(content_VD, valid_V=step_V > 0)
        interest_BD = self.interest(content_BD, history, row_N, sparse["history"].lengths())
        if self.training:
            self.step += 1
            self.bank.write(item_U, content_UD, self.step)

        loss, logit_B, id_BD = self.ranker(sparse, label_B, content_BD, interest_BD)
        # Content and ID of an item attract each other; the other items of the global batch are the negatives.
        any_row_U = torch.zeros_like(item_U).scatter(0, row_B, torch.arange(len(row_B), device=DEVICE))
        alignment = self.contrast(content_UD, id_BD[any_row_U], item_U, torch.bincount(row_B))
        return loss + 0.01 * alignment, logit_B, id_BD


def parallel(model: nn.Module) -> DistributedModelParallel:
    """Shard the tables as TorchRec's planner says and the bank by rows; replicate the rest."""
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            apply_optimizer_in_backward(RowWiseAdagrad, module.parameters(), {"lr": 0.1, "eps": 1e-8})
    sharders = [EmbeddingBagCollectionSharder(), TensorPoolSharder()]
    topology = Topology(world_size=dist.get_world_size(), compute_device=DEVICE.type)
    plan = EmbeddingShardingPlanner(topology=topology).collective_plan(model, sharders, dist.group.WORLD)
    for name, module in model.named_modules():
        if isinstance(module, ContentBank):  # which the planner does not know
            plan.plan[f"{name}.pool"] = ObjectPoolShardingPlan(ObjectPoolShardingType.ROW_WISE)
    return DistributedModelParallel(model, device=DEVICE, plan=plan, sharders=sharders)


class Clicks:
    """A simulated shop: users click on what agrees with their taste, and an item's tokens tell what it is, noisily."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.taste = torch.randn(USERS, 6, generator=draw)
        self.nature = torch.randn(ITEMS, 6, generator=draw)
        tokens_ID = self.nature @ torch.randn(6, TOKENS * TOKEN_WIDTH, generator=draw)
        tokens_ID += 2 * torch.randn(tokens_ID.shape, generator=draw)
        self.tokens_ITD = tokens_ID.view(ITEMS, TOKENS, TOKEN_WIDTH).to(DEVICE)
        # Items from 0 to NEW_ITEMS are new: in no history, and in no row of training.
        liked = self.taste @ self.nature[NEW_ITEMS:].T
        self.history = torch.multinomial(liked.exp(), HISTORY, generator=draw) + NEW_ITEMS

    def rows(self, first: int, end: int, draw: torch.Generator) -> tuple[KeyedJaggedTensor, Tensor]:
        """Draw rows whose targets are items of [first, end); return features and label_B."""
        user_B = torch.randint(USERS, (ROWS,), generator=draw)
        item_B = torch.randint(first, end, (ROWS,), generator=draw)
        chance_B = (self.taste[user_B] * self.nature[item_B]).sum(1).sigmoid()
        sparse = KeyedJaggedTensor(
            keys=["user", "target", "history"],
            values=torch.cat([user_B, item_B, self.history[user_B].flatten()]),
            lengths=torch.tensor([1, 1, HISTORY]).repeat_interleave(ROWS),
        )
        return sparse.to(DEVICE), torch.bernoulli(chance_B, generator=draw).to(DEVICE)


def train(model: DistributedModelParallel, clicks: Clicks) -> None:
    """Train on known items; each rank draws rows of its own."""
    dense = torch.optim.AdamW([weight for _, weight in in_backward_optimizer_filter(model.named_parameters())], lr=3e-3)
    draw = torch.Generator().manual_seed(1 + dist.get_rank())
    for _ in range(STEPS):
        loss, _, _ = model(*clicks.rows(NEW_ITEMS, ITEMS, draw))
        dense.zero_grad()
        loss.backward()  # the tables are updated here
        dense.step()


@torch.no_grad()
def auc(model: DistributedModelParallel, clicks: Clicks, first: int, end: int) -> float:
    """Return AUC over rows of the items of [first, end), the same rows on every rank."""
    model.eval()
    draw = torch.Generator().manual_seed(0)
    batches = [clicks.rows(first, end, draw) for _ in range(10)]
    logits = torch.cat([model(*batch)[1] for batch in batches])
    return float(binary_auroc(logits, torch.cat([label for _, label in batches]).int()))


def main() -> None:
    """Train both rankers and compare them on items that training had, and on new ones."""
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    torch.manual_seed(0)
    clicks = Clicks()
    for name, ranker in {"IDs": IdRanker(), "IDs and content": ContentRanker(clicks.tokens_ITD)}.items():
        model = parallel(ranker)
        train(model, clicks)
        known, new = auc(model, clicks, NEW_ITEMS, ITEMS), auc(model, clicks, 0, NEW_ITEMS)
        if dist.get_rank() == 0:
            print(f"{name:16} AUC on known items {known:.4f}, on new items {new:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
