"""Reference implementations of every objective, from its formula, with Python loops over samples.

Each function takes float64 unit rows `x` `(batch, dim)`, labels, and the objective, for its settings and weights.
"""

import itertools
import math

import numpy as np
import tensorflow as tf

from s2sd_tf import mining
from s2sd_tf.objectives.quadruplet import fourth_images


def hinge(value):
    return max(0.0, value)


def mean(values):
    return float(np.mean(values)) if values else 0.0


def log_sum_exp(values):
    peak = max(values)
    return peak + math.log(sum(math.exp(value - peak) for value in values))


def log1p_sum_exp(values):
    return log_sum_exp([0.0, *values])


def sigmoid(value):
    return 0.0 if value < -700 else 1.0 / (1.0 + math.exp(-value))


def positives(labels, i):
    return [j for j in range(len(labels)) if j != i and labels[j] == labels[i]]


def negatives(labels, i):
    return [j for j in range(len(labels)) if labels[j] != labels[i]]


def anchors(labels):
    """Yields the anchors that have positives and negatives, with both."""
    for i in range(len(labels)):
        if positives(labels, i) and negatives(labels, i):
            yield i, positives(labels, i), negatives(labels, i)


def triplets(labels):
    return [(a, p, n) for a, ps, ns in anchors(labels) for p, n in itertools.product(ps, ns)]


def distance(x, i, j):
    return float(np.linalg.norm(x[i] - x[j]))


def squared(x, i, j):
    return float(np.sum((x[i] - x[j]) ** 2))


def numbers(variable):
    return tf.convert_to_tensor(variable).numpy().astype(np.float64)


def triplet(x, labels, o):
    return mean([hinge(squared(x, a, p) - squared(x, a, n) + o.margin) for a, p, n in triplets(labels)])


def margin(x, labels, o):
    betas, total, active = numbers(o.betas), 0.0, 0
    for a, p, n in triplets(labels):
        beta = betas[labels[a]]
        hinges = [hinge(o.margin + distance(x, a, p) - beta), hinge(o.margin - distance(x, a, n) + beta)]
        total += sum(hinges) + o.nu * beta
        active += any(h > 0 for h in hinges) if o.divisor == "triplets" else sum(h > 0 for h in hinges)
    return total / active if active else 0.0


def snr(x, labels, o):
    def noise(i, j):
        return np.var(x[i] - x[j]) / np.var(x[i])

    losses = [hinge(noise(a, p) - noise(a, n) + o.margin) for a, p, n in triplets(labels)]
    if not losses:
        return 0.0
    return mean(losses) + o.regularization * mean([abs(row.sum()) for row in x])


def quadruplet(x, labels, o):
    # Uses the objective's own draws, which have their own test.
    found = mining.get("all")(None, tf.constant(labels, tf.int32), dim=None, seed=None)
    fourths, exist = fourth_images(tf.constant(labels, tf.int32), found, tf.constant([o.seed, 0]))
    losses = []
    for a, p, n, m, exists, valid in zip(*(np.array(v) for v in (*found[:3], fourths, exist, found.valid))):
        if valid:
            losses.append(hinge(squared(x, a, p) - squared(x, a, n) + o.margin))
            if exists:
                losses[-1] += hinge(squared(x, a, p) - squared(x, n, m) + o.second_margin)
    return mean(losses)


def contrastive(x, labels, o):
    batch = range(len(labels))
    power = 2 if o.squared else 1
    pull = [hinge(distance(x, i, j) - o.positive_margin) ** power for i in batch for j in positives(labels, i)]
    push = [hinge(o.negative_margin - distance(x, i, j)) ** power for i in batch for j in negatives(labels, i)]
    return mean(pull) + mean(push)


def multi_similarity(x, labels, o):
    losses = []
    for i in range(len(labels)):
        ps = [x[i] @ x[j] for j in positives(labels, i)]
        ns = [x[i] @ x[j] for j in negatives(labels, i)]
        if o.epsilon >= 0:
            if not ps or not ns:
                continue
            kept = [s for s in ps if s - o.epsilon < max(ns)]
            ns = [s for s in ns if s + o.epsilon > min(ps)]
            ps = kept
            if not ps or not ns:
                continue
        pull = log1p_sum_exp([-o.alpha * (s - o.lambda_) for s in ps]) / o.alpha
        losses.append(pull + log1p_sum_exp([o.beta * (s - o.lambda_) for s in ns]) / o.beta)
    return mean(losses)


def n_pair(x, labels, o):
    return mean(
        [
            log1p_sum_exp([(x[a] @ x[n] - x[a] @ x[p]) / o.temperature for n in ns])
            for a, ps, ns in anchors(labels)
            for p in ps
        ]
    )


def angular(x, labels, o):
    t = math.tan(math.radians(o.alpha)) ** 2
    angles = [
        log1p_sum_exp([4 * t * (x[a] + x[p]) @ x[n] - 2 * (1 + t) * x[a] @ x[p] for n in ns])
        for a, ps, ns in anchors(labels)
        for p in ps
    ]
    return n_pair(x, labels, o) + o.angular_weight * mean(angles)


def lifted_structure(x, labels, o):
    losses = []
    for a, ps, ns in anchors(labels):
        for p in ps:
            push = [o.margin - distance(x, a, n) for n in ns]
            push += [o.margin - distance(x, p, n) for n in negatives(labels, p)]
            losses.append(hinge(log_sum_exp(push) + distance(x, a, p)) ** 2 / 2)
    return mean(losses)


def generalized_lifted(x, labels, o):
    return mean(
        [
            hinge(
                log_sum_exp([distance(x, a, p) for p in ps]) + log_sum_exp([o.margin - distance(x, a, n) for n in ns])
            )
            for a, ps, ns in anchors(labels)
        ]
    )


def circle(x, labels, o):
    losses = []
    for a, ps, ns in anchors(labels):
        pull = [-o.gamma * hinge(1 + o.margin - x[a] @ x[p]) * (x[a] @ x[p] - 1 + o.margin) for p in ps]
        push = [o.gamma * hinge(x[a] @ x[n] + o.margin) * (x[a] @ x[n] - o.margin) for n in ns]
        losses.append(log1p_sum_exp([log_sum_exp(pull) + log_sum_exp(push)]))
    return mean(losses)


def supcon(x, labels, o):
    losses = []
    for a, ps, ns in anchors(labels):
        total = log_sum_exp([x[a] @ x[j] / o.temperature for j in ps + ns])
        losses.append(-mean([x[a] @ x[p] / o.temperature - total for p in ps]))
    return mean(losses)


def nt_xent(x, labels, o):
    losses = []
    for a, ps, ns in anchors(labels):
        for p in ps:
            total = log_sum_exp([x[a] @ x[j] / o.temperature for j in [p, *ns]])
            losses.append(total - x[a] @ x[p] / o.temperature)
    return mean(losses)


def histogram(x, labels, o):
    nodes, width = np.linspace(-1, 1, o.bins), 2 / (o.bins - 1)

    def histogram_of(similarities):
        shares = [[hinge(1 - abs(s - node) / width) for node in nodes] for s in similarities]
        return np.mean(shares, axis=0) if shares else np.zeros(o.bins)

    batch = range(len(labels))
    pull = histogram_of([x[i] @ x[j] for i in batch for j in positives(labels, i)])
    push = histogram_of([x[i] @ x[j] for i in batch for j in negatives(labels, i)])
    return sum(push[r] * sum(pull[: r + 1]) for r in range(o.bins))


def fast_ap(x, labels, o):
    nodes, width = np.linspace(0, 4, o.bins + 1), 4 / o.bins
    losses = []
    for a, ps, ns in anchors(labels):
        pull = [sum(hinge(1 - abs(squared(x, a, j) - node) / width) for j in ps) for node in nodes]
        every = [sum(hinge(1 - abs(squared(x, a, j) - node) / width) for j in ps + ns) for node in nodes]
        total = 0.0
        for j in range(len(nodes)):
            if pull[j] > 0:
                total += pull[j] * sum(pull[: j + 1]) / sum(every[: j + 1])
        losses.append(1 - total / len(ps))
    return mean(losses)


def recall_at_k_surrogate(x, labels, o):
    losses = []
    for a, ps, ns in anchors(labels):
        for k in o.ks:
            found = 0.0
            for p in ps:
                gaps = [(x[a] @ x[z] - x[a] @ x[p]) / o.rank_temperature for z in ps + ns if z != p]
                found += sigmoid((k - 1 - sum(sigmoid(gap) for gap in gaps)) / o.temperature)
            losses.append(1 - min(1.0, found / min(k, len(ps))))
    return mean(losses)


def unit_proxies(o):
    proxies = numbers(o.proxies)
    return proxies / np.linalg.norm(proxies, axis=-1, keepdims=True)


def cross_entropy(logits, label):
    return log_sum_exp(list(logits)) - logits[label]


def normalized_softmax(x, labels, o):
    proxies = unit_proxies(o)
    return mean([cross_entropy([row @ p / o.temperature for p in proxies], y) for row, y in zip(x, labels)])


def arcface(x, labels, o):
    losses = []
    for row, y in zip(x, labels):
        cosines = [float(row @ p) for p in unit_proxies(o)]
        angle = math.acos(cosines[y])
        moved = math.cos(angle + o.margin)
        cosines[y] = moved if angle + o.margin < math.pi else cosines[y] - o.margin * math.sin(o.margin)
        losses.append(cross_entropy([o.scale * c for c in cosines], y))
    return mean(losses)


def cosface(x, labels, o):
    losses = []
    for row, y in zip(x, labels):
        logits = [o.scale * (row @ p - (o.margin if c == y else 0)) for c, p in enumerate(unit_proxies(o))]
        losses.append(cross_entropy(logits, y))
    return mean(losses)


def proxy_nca(x, labels, o):
    losses = []
    for row, y in zip(x, labels):
        logits = [-o.scale * float(np.sum((row - p) ** 2)) for p in unit_proxies(o)]
        summed = [v for c, v in enumerate(logits) if o.own_class_in_sum or c != y]
        losses.append(log_sum_exp(summed) - logits[y])
    return mean(losses)


def proxy_anchor(x, labels, o):
    pull, push = [], []
    for c, proxy in enumerate(unit_proxies(o)):
        own = [proxy @ row for row, label in zip(x, labels) if label == c]
        others = [proxy @ row for row, label in zip(x, labels) if label != c]
        if own:
            pull.append(log1p_sum_exp([-o.alpha * (s - o.margin) for s in own]))
        push.append(log1p_sum_exp([o.alpha * (s + o.margin) for s in others]))
    return mean(pull) + mean(push)


def soft_triple(x, labels, o):
    centers = unit_proxies(o)  # (centres, classes, dim)
    losses = []
    for row, y in zip(x, labels):
        logits = []
        for c in range(o.num_classes):
            to_centers = [float(row @ center[c]) for center in centers]
            weights = [math.exp(s / o.gamma) for s in to_centers]
            relaxed = sum(w * s for w, s in zip(weights, to_centers)) / sum(weights)
            logits.append(o.scale * (relaxed - (o.margin if c == y else 0)))
        losses.append(cross_entropy(logits, y))
    count = len(centers)
    apart = sum(
        np.linalg.norm(centers[s][c] - centers[t][c])
        for c in range(o.num_classes)
        for s in range(count)
        for t in range(s)
    )
    return mean(losses) + o.regularization * apart / max(1, o.num_classes * count * (count - 1))
