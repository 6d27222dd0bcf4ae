// Long because the ids, the checks and the creation of sets go through the same arrays.

#include "adaskip-plan.h"

#include "adaskip-error.h"
#include "adaskip-kv.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <map>

//
// ids
//

// FNV-1a in words of 64 bits
class adaskip_hash {
public:
    template <typename T> void add(const T * data, size_t n) {
        const char * bytes = (const char *) data;
        for (size_t i = 0; i < n * sizeof(T); i += sizeof(uint64_t)) {
            uint64_t word = 0;
            std::memcpy(&word, bytes + i, std::min(sizeof(word), n * sizeof(T) - i));
            add(word);
        }
    }
    void add(uint64_t word) {
        value = (value ^ word) * 0x100000001b3ULL;
        value ^= value >> 32;
    }
    uint64_t id() const { return adaskip_set_of(value) | ADASKIP_MOVED_WHOLE; }

    uint64_t value = 0xcbf29ce484222325ULL;
};

// Hashes and checks of the vectors and maps of plans, each read once. A frontier's plans share their maps. Vectors must
// stay as they are meanwhile.
class adaskip_vectors_read {
public:
    struct found {
        uint64_t hash;
        bool     is_finite;
    };

    const found & of(const float * data, size_t n) {
        const auto [it, is_new] = known.try_emplace({ data, n });
        if (is_new) {
            it->second = read(data, n);
        }
        return it->second;
    }

private:
    static found read(const float * data, size_t n) {
        // the CPU multiplies in these lanes at the same time
        constexpr size_t N_LANES = 4;
        constexpr size_t N_STEP  = N_LANES * sizeof(uint64_t) / sizeof(float);

        adaskip_hash lanes[N_LANES];
        size_t       i = 0;
        for (; i + N_STEP <= n; i += N_STEP) {
            uint64_t words[N_LANES];
            std::memcpy(words, data + i, sizeof(words));
            for (size_t k = 0; k < N_LANES; ++k) {
                lanes[k].add(words[k]);
            }
        }
        adaskip_hash hash;
        for (const auto & lane : lanes) {
            hash.add(lane.value);
        }
        hash.add(data + i, n - i);

        constexpr uint32_t infinite = 0x7f800000;
        uint32_t           most     = 0;
        for (i = 0; i < n; ++i) {
            uint32_t bits;
            std::memcpy(&bits, data + i, sizeof(bits));
            most = std::max(most, bits & 0x7fffffff);
        }
        return { hash.value, most < infinite };
    }

    std::map<std::pair<const float *, size_t>, found> known;
};

// what a bulk has besides its set: attentions that look back at a window, and whether maps may be replaced
struct adaskip_around {
    const uint8_t * windowed = nullptr; // [n_layer]
    int32_t         window   = 0;
    int32_t         n_sinks  = 0;
    int32_t         refits   = 0;

    bool has(int32_t il) const { return windowed && windowed[il]; }
};

static adaskip_around around_of(const adaskip_plan & plan) {
    return { plan.windowed, plan.window, plan.n_sinks, plan.refits };
}

// whether the set skips nothing and no attention looks back at a window
static bool is_whole(const adaskip_set & set, const adaskip_around & around) {
    for (int32_t i = 0; i < 2 * set.n_layer; ++i) {
        if (set.skip[i] || around.has(i / 2)) {
            return false;
        }
    }
    return true;
}

static uint64_t make_set_id(
        const adaskip_set & set, bool keeps_kv, const adaskip_around & around, adaskip_vectors_read & vectors) {
    if (is_whole(set, around)) {
        return 0;
    }
    adaskip_hash hash;
    if (keeps_kv) {
        const uint32_t mark = 2 * (uint32_t) set.n_layer; // not the number of a sublayer
        hash.add(&mark, 1);
    }
    if (around.refits) {
        const uint32_t mark = 2 * (uint32_t) set.n_layer + 2;
        hash.add(&mark, 1);
    }
    for (uint32_t il = 0; il < (uint32_t) set.n_layer; ++il) {
        if (around.has((int32_t) il) && !set.skip[2 * il]) {
            const uint32_t parts[] = { 2 * (uint32_t) set.n_layer + 1, il };
            hash.add(parts, 2);
            hash.add(&around.window, 1);
            hash.add(&around.n_sinks, 1);
        }
    }
    const size_t n_map = set.down ? (size_t) set.n_rank * set.n_embd : 0;
    for (uint32_t i = 0; i < 2 * (uint32_t) set.n_layer; ++i) {
        if (!set.skip[i]) {
            continue;
        }
        const uint32_t parts[] = { i, set.bias != nullptr, (uint32_t) n_map };
        hash.add(parts, 3);
        hash.add(set.scale + i, 1);
        if (set.bias) {
            hash.add(vectors.of(set.bias + i * set.n_embd, set.n_embd).hash);
        }
        if (set.down) {
            hash.add(vectors.of(set.down + i * n_map, n_map).hash);
            hash.add(vectors.of(set.up + i * n_map, n_map).hash);
        }
    }
    return hash.id();
}

uint64_t adaskip_online_set_id(uint64_t set_id, const adaskip_online_params & params) {
    adaskip_hash hash;
    hash.add(&set_id, 1);
    hash.add(&params.window, 1);
    hash.add(&params.scale, 1);
    hash.add(&params.threshold, 1);
    return hash.id();
}

uint64_t adaskip_new_graph_id() {
    static std::atomic<uint64_t> n_ids = 0;
    return ++n_ids;
}

bool adaskip_plan_sets::is_readable(uint64_t set_id, const std::vector<bool> & skipped) const {
    set_id = adaskip_set_of(set_id);
    if (set_id == 0 || set_id == ADASKIP_MOVED_WHOLE) {
        return true;
    }
    const auto it = holes.find(set_id);
    if (it == holes.end()) {
        return false;
    }
    for (size_t il = 0; il < it->second.size(); ++il) {
        if (it->second[il] && !(il < skipped.size() && skipped[il])) {
            return false;
        }
    }
    return true;
}

//
// plans
//

template <typename... Args> [[noreturn]] static void refuse(int32_t code, const char * fmt, Args... args) {
    throw adaskip_exception(code, format(fmt, args...));
}

// set: null to run everything
static void check_set(const llama_model & model, const std::vector<adaskip_sublayer> & sublayers,
        const std::vector<bool> & elided, const adaskip_set * set, bool keeps_kv, adaskip_vectors_read & vectors) {
    const int32_t n_layer = llama_model_n_layer(&model);
    const int32_t n_embd  = llama_model_n_embd(&model);

    if (set && set->n_layer != n_layer) {
        refuse(ADASKIP_ERROR_ARGUMENT, "the plan has %d layers, the model %d", set->n_layer, n_layer);
    }
    if (set && (!set->skip || !set->scale)) {
        refuse(ADASKIP_ERROR_ARGUMENT, "the plan has no arrays");
    }
    if (set && (!set->down != !set->up || (set->down && set->n_rank < 1))) {
        refuse(ADASKIP_ERROR_ARGUMENT, "the plan has one half of a low-rank map, or one without a rank");
    }
    if (set && (set->bias || set->down) && set->n_embd != n_embd) {
        refuse(ADASKIP_ERROR_ARGUMENT, "the plan's vectors have %d values, the model %d", set->n_embd, n_embd);
    }
    for (int32_t il = 0; il < std::min(n_layer, (int32_t) elided.size()); ++il) {
        if (elided[il] && (keeps_kv || !(set && set->skip[2 * il + ADASKIP_ATTENTION]))) {
            refuse(ADASKIP_ERROR_KV_ELIDED,
                    "layer %d: the attention would run, but the model was opened without KV for it", il);
        }
    }
    for (int32_t i = 0; set && i < 2 * n_layer; ++i) {
        if (!set->skip[i]) {
            continue;
        }
        const char * kind = i % 2 == ADASKIP_ATTENTION ? "attention" : "FFN";
        if (!(keeps_kv ? sublayers[i].in_bulk : sublayers[i].skippable)) {
            refuse(ADASKIP_ERROR_NOT_SKIPPABLE, "layer %d: the %s cannot be skipped: %s", i / 2, kind,
                    sublayers[i].reason);
        }
        if (!std::isfinite(set->scale[i]) || set->scale[i] <= 0.0f) {
            refuse(ADASKIP_ERROR_COMPENSATION, "layer %d: the scale of the %s is %g, not a positive number", i / 2,
                    kind, set->scale[i]);
        }
        const auto is_finite = [&](const float * data, size_t n) {
            return !data || vectors.of(data + i * n, n).is_finite;
        };
        const size_t n_map = set->down ? (size_t) set->n_rank * n_embd : 0;
        if (!is_finite(set->bias, n_embd) || !is_finite(set->down, n_map) || !is_finite(set->up, n_map)) {
            refuse(ADASKIP_ERROR_COMPENSATION, "layer %d: the compensation of the %s has a value that is not finite",
                    i / 2, kind);
        }
    }
}

static void check_windows(const std::vector<adaskip_sublayer> & sublayers, const adaskip_plan & plan) {
    if (!plan.windowed) {
        return;
    }
    if (plan.window < 1 || plan.n_sinks < 0) {
        refuse(ADASKIP_ERROR_ARGUMENT, "the plan has a window of %d tokens and %d sinks", plan.window, plan.n_sinks);
    }
    for (int32_t il = 0; il < plan.bulk->n_layer; ++il) {
        if (plan.windowed[il] && !plan.bulk->skip[2 * il] && !sublayers[2 * il].windowable) {
            refuse(ADASKIP_ERROR_NOT_SKIPPABLE, "layer %d: the attention cannot look back at a window: %s", il,
                    sublayers[2 * il].window > 0 ? "its own one is of another kind"
                                                 : "it reads its K and V in another way");
        }
    }
}

static void check_readable(const std::vector<bool> & elided, const adaskip_plan & plan) {
    if (plan.n_readable < 0 || (plan.n_readable > 0 && !plan.readable)) {
        refuse(ADASKIP_ERROR_ARGUMENT, "the plan names %d readable sets", plan.n_readable);
    }
    if (plan.n_readable > 0 && !elided.empty()) {
        refuse(ADASKIP_ERROR_KV_ELIDED,
                "the plan reads positions of other plans' bulk sets, but the model was opened without KV for some "
                "attentions");
    }
}

// checks the steps of decode and the online stage
static void check_decode(const adaskip_plan & plan) {
    if (plan.n_decode < 0 || (plan.n_decode > 0 && !plan.decode)) {
        refuse(ADASKIP_ERROR_ARGUMENT, "the plan has %d sets for decode", plan.n_decode);
    }
    for (int32_t i = 0; i < plan.n_decode; ++i) {
        if (i == 0 ? plan.decode[i].start != 0 : plan.decode[i].start <= plan.decode[i - 1].start) {
            refuse(ADASKIP_ERROR_ARGUMENT, "the sets of a schedule are not in ascending order from token 0 on");
        }
        for (int32_t il = 0; i > 0 && il < plan.decode[i].set.n_layer; ++il) {
            if (plan.decode[i - 1].set.skip[2 * il] && !plan.decode[i].set.skip[2 * il]) {
                refuse(ADASKIP_ERROR_ARGUMENT, "layer %d: the schedule runs an attention again that it skipped before",
                        il);
            }
        }
    }
    if (const auto * online = plan.online) {
        if (online->window < 1) {
            refuse(ADASKIP_ERROR_ARGUMENT, "the window is %d tokens, not at least 1", online->window);
        }
        if (!std::isfinite(online->threshold)) {
            refuse(ADASKIP_ERROR_ARGUMENT, "the threshold is not a finite number");
        }
        if (online->scale < ADASKIP_ONLINE_SCALE_NONE || online->scale > ADASKIP_ONLINE_SCALE_MEDIAN) {
            refuse(ADASKIP_ERROR_ARGUMENT, "unknown online scale %d", online->scale);
        }
    }
}

// uploads the set, or returns the known one of the same id
static adaskip_skip_set make_set(const llama_model & model, const adaskip_set * set, bool keeps_kv,
        const adaskip_around & around, const std::map<uint64_t, const adaskip_skip_set *> & known,
        adaskip_vectors_read & vectors) {
    adaskip_skip_set res;
    const int32_t    n = set ? 2 * set->n_layer : 0;

    std::vector<bool> windowed(n / 2);
    for (int32_t il = 0; il < n / 2; ++il) {
        windowed[il] = around.has(il) && !set->skip[2 * il];
    }
    res.set_id = set ? make_set_id(*set, keeps_kv, around, vectors) : 0;
    if (res.set_id == 0) {
        return res;
    }
    const auto it = known.find(res.set_id);
    if (it != known.end()) {
        return *it->second;
    }
    res.graph_id = adaskip_new_graph_id();
    res.keeps_kv = keeps_kv;
    res.refits   = around.refits;
    res.skip.assign(n, 0);
    res.scale.assign(n, 1.0f);
    res.attention.assign(set->n_layer, false);
    if (std::find(windowed.begin(), windowed.end(), true) != windowed.end()) {
        res.windowed = std::move(windowed);
        res.window   = around.window;
        res.n_sinks  = around.n_sinks;
    }
    for (int32_t i = 0; i < n; ++i) {
        if (set->skip[i]) {
            res.skip[i]  = 1;
            res.scale[i] = set->scale[i];
            if (i % 2 == ADASKIP_ATTENTION) {
                res.attention[i / 2] = true;
            }
        }
    }
    if (set->bias) {
        res.bias = adaskip_vectors_init(model, res.skip, set->bias, set->n_embd, 1, false);
    }
    if (set->down) {
        const size_t n_map   = (size_t) set->n_rank * set->n_embd;
        auto         has_map = res.skip;
        const auto   is_zero = [](float x) { return x == 0.0f; };
        for (int32_t i = 0; i < n; ++i) {
            has_map[i] = has_map[i] && !std::all_of(set->up + i * n_map, set->up + (i + 1) * n_map, is_zero);
        }
        res.down = adaskip_vectors_init(model, has_map, set->down, set->n_embd, set->n_rank, !keeps_kv);
        res.up   = adaskip_vectors_init(model, has_map, set->up, set->n_rank, set->n_embd, !keeps_kv);
    }
    return res;
}

// the set of a bulk without what it skips
static adaskip_skip_set narrow_of(const adaskip_skip_set & bulk) {
    adaskip_skip_set res;
    res.skip.assign(bulk.skip.size(), 0);
    res.scale.assign(bulk.skip.size(), 1.0f);
    res.attention.assign(bulk.attention.size(), false);
    res.keeps_kv = true;
    res.windowed = bulk.windowed;
    res.window   = bulk.window;
    res.n_sinks  = bulk.n_sinks;
    res.set_id   = bulk.set_id;
    res.graph_id = adaskip_new_graph_id();
    return res;
}

adaskip_plan_sets adaskip_plan_init(const llama_model & model, const std::vector<adaskip_sublayer> & sublayers,
        const std::vector<bool> & elided, const adaskip_plan * plan, const adaskip_plan_sets & in_force) {
    static const adaskip_plan whole = {};
    if (!plan) {
        plan = &whole;
    }
    std::vector<const adaskip_set *> decode;
    for (int32_t i = 0; plan->decode && i < plan->n_decode; ++i) {
        decode.push_back(&plan->decode[i].set);
    }
    if (decode.empty()) {
        decode.push_back(nullptr);
    }
    adaskip_vectors_read vectors;
    if (plan->bulk) {
        check_set(model, sublayers, elided, plan->bulk, true, vectors);
        check_windows(sublayers, *plan);
    }
    check_set(model, sublayers, elided, plan->prefill, false, vectors);
    for (const auto * set : decode) {
        check_set(model, sublayers, elided, set, false, vectors);
    }
    check_decode(*plan);
    check_readable(elided, *plan);

    std::map<uint64_t, const adaskip_skip_set *> known;
    const auto remember = [&](const adaskip_skip_set & set) { known.insert({ set.set_id, &set }); };
    remember(in_force.bulk);
    remember(in_force.prefill);
    for (const auto & step : in_force.decode) {
        remember(step.set);
    }

    adaskip_plan_sets res;
    res.tag  = plan->tag;
    res.bulk = make_set(model, plan->bulk, true, around_of(*plan), known, vectors);
    remember(res.bulk);
    res.prefill = make_set(model, plan->prefill, false, {}, known, vectors);
    remember(res.prefill);
    res.narrow = in_force.narrow;
    if (res.narrow.set_id != res.bulk.set_id || !res.prefill.empty()) {
        res.narrow = res.bulk.windowed.empty() || !res.prefill.empty() ? adaskip_skip_set() : narrow_of(res.bulk);
    }
    res.decode.clear();
    res.decode.reserve(decode.size());
    for (size_t i = 0; i < decode.size(); ++i) {
        res.decode.push_back({ plan->n_decode > 0 ? plan->decode[i].start : 0,
                make_set(model, decode[i], false, {}, known, vectors) });
        remember(res.decode[i].set);
    }
    if (plan->online) {
        res.online = *plan->online;
    }

    // an attention that reads another layer's KV writes none, so it leaves no hole
    const auto holes_of = [&](const adaskip_skip_set & set) {
        auto holes = set.keeps_kv ? std::vector<bool>() : set.attention;
        for (size_t il = 0; il < holes.size(); ++il) {
            holes[il] = holes[il] && model.hparams.has_kv((uint32_t) il);
        }
        return holes;
    };
    for (int32_t i = 0; i < plan->n_readable; ++i) {
        res.holes[plan->readable[i]] = {}; // the holes of the plan's own sets, below, replace this
    }
    res.holes[res.bulk.set_id]    = holes_of(res.bulk);
    res.holes[res.prefill.set_id] = holes_of(res.prefill);
    for (const auto & step : res.decode) {
        res.holes[step.set.set_id] = holes_of(step.set);
        if (res.online) {
            res.holes[adaskip_online_set_id(step.set.set_id, *res.online)] = holes_of(step.set);
        }
    }
    return res;
}

void adaskip_plan_bulk_ids(const llama_model & model, const std::vector<adaskip_sublayer> & sublayers,
        const std::vector<bool> & elided, const adaskip_plan * plans, int32_t n, uint64_t * ids) {
    adaskip_vectors_read vectors;
    for (int32_t i = 0; i < n; ++i) {
        const auto & plan = plans[i];
        if (plan.bulk) {
            check_set(model, sublayers, elided, plan.bulk, true, vectors);
            check_windows(sublayers, plan);
        }
        ids[i] = plan.bulk ? make_set_id(*plan.bulk, true, around_of(plan), vectors) : 0;
    }
}
