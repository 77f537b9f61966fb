# %% 1 · both projections as wide as the stream
answer_1 = 18 * 8 * (2048 + 2048) * 2
# %% 1 · one layer
answer_1 = 8 * (2048 + 2048) + 8 * (2048 + 256)
# %% 1 · only q_proj
answer_1 = 18 * 8 * (2048 + 2048)
# %% 1 · only v_proj
answer_1 = 18 * 8 * (2048 + 256)
# %% 1 · the frozen weights
answer_1 = 18 * 2048 * (2048 + 256)
# %% 1 · only the A matrices
answer_1 = 18 * 8 * (2048 + 2048)
# %% 1 · a head of 256 as the output of q_proj, too
answer_1 = 18 * 8 * (2048 + 256) * 2
# %% 1 · with the vision tower
answer_1 = 45 * 8 * (2048 + 2048)
# %% 1 · a float
answer_1 = 921600.5


# %% 2 · both random
class LoRAEmbedding(nn.Module):
    def __init__(self, embedding, rank, alpha):
        super().__init__()
        rows, width = embedding.weight.shape
        self.embedding, self.scale = embedding.requires_grad_(False), alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, rows))
        self.lora_B = nn.Parameter(torch.randn(width, rank))

    def forward(self, ids):
        return self.embedding(ids) + self.scale * self.lora_A.T[ids] @ self.lora_B.T


# %% 2 · both zero
class LoRAEmbedding(nn.Module):
    def __init__(self, embedding, rank, alpha):
        super().__init__()
        rows, width = embedding.weight.shape
        self.embedding, self.scale = embedding.requires_grad_(False), alpha / rank
        self.lora_A = nn.Parameter(torch.zeros(rank, rows))
        self.lora_B = nn.Parameter(torch.zeros(width, rank))

    def forward(self, ids):
        return self.embedding(ids) + self.scale * self.lora_A.T[ids] @ self.lora_B.T


# %% 2 · the table is not frozen
class LoRAEmbedding(nn.Module):
    def __init__(self, embedding, rank, alpha):
        super().__init__()
        rows, width = embedding.weight.shape
        self.embedding, self.scale = embedding, alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, rows))
        self.lora_B = nn.Parameter(torch.zeros(width, rank))

    def forward(self, ids):
        return self.embedding(ids) + self.scale * self.lora_A.T[ids] @ self.lora_B.T


# %% 2 · plain tensors
class LoRAEmbedding(nn.Module):
    def __init__(self, embedding, rank, alpha):
        super().__init__()
        rows, width = embedding.weight.shape
        self.embedding, self.scale = embedding.requires_grad_(False), alpha / rank
        self.lora_A = torch.randn(rank, rows)
        self.lora_B = torch.zeros(width, rank)

    def forward(self, ids):
        return self.embedding(ids) + self.scale * self.lora_A.T[ids] @ self.lora_B.T


# %% 2 · forgets the scale
class LoRAEmbedding(nn.Module):
    def __init__(self, embedding, rank, alpha):
        super().__init__()
        rows, width = embedding.weight.shape
        self.embedding = embedding.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, rows))
        self.lora_B = nn.Parameter(torch.zeros(width, rank))

    def forward(self, ids):
        return self.embedding(ids) + self.lora_A.T[ids] @ self.lora_B.T


# %% 2 · scales by α alone
class LoRAEmbedding(nn.Module):
    def __init__(self, embedding, rank, alpha):
        super().__init__()
        rows, width = embedding.weight.shape
        self.embedding, self.scale = embedding.requires_grad_(False), alpha
        self.lora_A = nn.Parameter(torch.randn(rank, rows))
        self.lora_B = nn.Parameter(torch.zeros(width, rank))

    def forward(self, ids):
        return self.embedding(ids) + self.scale * self.lora_A.T[ids] @ self.lora_B.T


# %% 2 · never adds it
class LoRAEmbedding(nn.Module):
    def __init__(self, embedding, rank, alpha):
        super().__init__()
        rows, width = embedding.weight.shape
        self.embedding = embedding.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, rows))
        self.lora_B = nn.Parameter(torch.zeros(width, rank))

    def forward(self, ids):
        return self.embedding(ids)


# %% 2 · A and B exchanged
class LoRAEmbedding(nn.Module):
    def __init__(self, embedding, rank, alpha):
        super().__init__()
        rows, width = embedding.weight.shape
        self.embedding, self.scale = embedding.requires_grad_(False), alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, width))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, ids):
        return self.embedding(ids) + self.scale * self.lora_B[ids] @ self.lora_A


# %% 2 · only the correction
class LoRAEmbedding(nn.Module):
    def __init__(self, embedding, rank, alpha):
        super().__init__()
        rows, width = embedding.weight.shape
        self.embedding, self.scale = embedding.requires_grad_(False), alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, rows))
        self.lora_B = nn.Parameter(torch.zeros(width, rank))

    def forward(self, ids):
        return self.scale * self.lora_A.T[ids] @ self.lora_B.T


# %% 3 · the first rows and columns
def squeeze(delta, rank):
    return delta[:rank], torch.eye(len(delta))[:, :rank]


# %% 3 · forgets the singular values
def squeeze(delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return Vh[:rank], U[:, :rank]


# %% 3 · the singular values on both sides
def squeeze(delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return S[:rank, None] * Vh[:rank], U[:, :rank] * S[:rank]


# %% 3 · the smallest directions
def squeeze(delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return Vh[-rank:], U[:, -rank:] * S[-rank:]


# %% 3 · A and B exchanged
def squeeze(delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


# %% 3 · takes columns of Vh
def squeeze(delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return Vh[:, :rank].T, U[:, :rank] * S[:rank]


# %% 3 · the whole change
def squeeze(delta, rank):
    return delta, torch.eye(len(delta))


# %% 3 · returns their product
def squeeze(delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


# %% 1 · the correction as a whole matrix
answer_1 = 18 * (2048 * 2048 + 2048 * 256)


# %% 2 · corrects with the position, not with the id
class LoRAEmbedding(nn.Module):
    def __init__(self, embedding, rank, alpha):
        super().__init__()
        rows, width = embedding.weight.shape
        self.embedding, self.scale = embedding.requires_grad_(False), alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, rows))
        self.lora_B = nn.Parameter(torch.zeros(width, rank))

    def forward(self, ids):
        correction = (self.lora_B @ self.lora_A).T[: ids.shape[1]]
        return self.embedding(ids) + self.scale * correction
