#pragma once

#include "adaskip.h"
#include "adaskip-plan.h"

#include <cstdint>
#include <optional>
#include <vector>

// The online stage: in decode, observes the FFNs that run for the first tokens of a request. Then it adds those that
// change little to the skip set.
class adaskip_online {
public:
    // turns the stage on, or off with null
    void set_params(const std::optional<adaskip_online_params> & params);

    // forgets the observations, for the next request
    void reset();

    bool observes() const { return enabled && !done; }

    // values: [n_layer][2][3][n_tokens], as in adaskip_statistics
    void accumulate(const std::vector<float> & values, int64_t n_tokens);

    // The skip set `value` with the FFNs that are added, without a graph id yet; empty if none is added. For use when
    // the window is full.
    bool             is_full() const { return n_tokens >= params.window; }
    adaskip_skip_set finish(adaskip_skip_set value);

    int32_t get_n_tokens() const { return n_tokens; }
    bool    is_done() const { return done; }

    // NaN where not observed
    double similarity(int il) const;
    double norm_ratio(int il) const;
    double scale(int il) const;

private:
    bool observed(int il) const { return il < (int) ratios.size() && !ratios[il].empty(); }

    bool                  enabled = false;
    adaskip_online_params params  = {};

    //
    // this request
    //

    bool    done     = false;
    int32_t n_tokens = 0;

    std::vector<double>             sum_similarity; // [n_layer], over the observed tokens
    std::vector<double>             sum_u_sq;
    std::vector<double>             sum_v_sq;
    std::vector<std::vector<float>> ratios; // [n_layer][n_tokens], empty where not observed
};
