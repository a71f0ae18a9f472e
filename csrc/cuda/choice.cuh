// docs/spec.md, step 5, on a GPU: the experts that a token chooses by selection scores, which are in the registers of the
// threads that share its row.
#pragma once

#include "cuda/token.cuh"
#include "cuda/top8.cuh"

namespace topn_gating::cuda {

// Returns whether groups of experts are as RowChoice::close_groups needs them.
template <class RowLayout>
bool groups_fit(const Gate& a) {
  const int64_t size = a.experts / a.expert_groups, threads = size / RowLayout::chunk;
  const bool share = size % RowLayout::chunk == 0 && (threads & (threads - 1)) == 0 && threads <= RowLayout::width;
  return a.expert_groups == 1 || share;
}

// Chooses experts, those of the ranks that this thread has.
template <class T, class RowLayout, Kind kind>
class RowChoice {
 public:
  static constexpr bool Plain = kind == Kind::Plain;
  // Scores from 16-bit elements fit into keys.
  static constexpr bool kExact = Plain && sizeof(T) == 2;
  static constexpr int kRounds = Plain ? 1 : 2;  // of eight ranks
  using Key = PackedKeys<RowLayout, kExact>;
  using Top = Top8<RowLayout::width, RowLayout::count>;
  using Row = typename RowLayout::template Row<float>;
  static constexpr int kRanks = Top::ranks * kRounds;
  static constexpr int kRowFloats = RowLayout::width * RowLayout::count;

  // A row in shared memory for each row of the block.
  static constexpr size_t shared_bytes(unsigned block) {
    return kExact ? 0 : block / RowLayout::width * kRowFloats * sizeof(float);
  }

  __device__ RowChoice(const Gate& a, const RowLayout& layout, float* shared)
      : a_(a), layout_(layout), top_(layout.thread), keys_(layout),
        row_(shared + int(threadIdx.x) / RowLayout::width * kRowFloats), top_n_(int(a.top_n)) {}

  // The rank of this thread's choice j; none from top_n on.
  __device__ __forceinline__ int rank(int j) const { return top_.first_rank + j % Top::ranks + j / Top::ranks * 8; }

  // Closes the groups of experts that are not among the best. A chunk of a thread's values is in one group, which so many
  // neighbouring threads share: see `groups_fit`.
  __device__ __forceinline__ void close_groups(const Row& selection) {
    constexpr int chunk = RowLayout::chunk, columns = RowLayout::count / chunk;
    const int size = layout_.experts / int(a_.expert_groups), threads = size / chunk, in_column = RowLayout::width / threads;
    int32_t group[columns];
    TOPN_UNROLL
    for (int c = 0; c < columns; ++c) {
      int32_t best = kClosed, second = kClosed;
      TOPN_UNROLL
      for (int i = c * chunk; i < (c + 1) * chunk; ++i) {
        const int32_t key = score_key<RowLayout>(selection[i]), lower = key < best ? key : best;
        second = lower > second ? lower : second;
        best = key > best ? key : best;
      }
      for (int by = 1; by < threads; by *= 2) {
        const int32_t other = shuffle_xor(best, by), other_second = shuffle_xor(second, by);
        const int32_t lower = other < best ? other : best, higher_second = other_second > second ? other_second : second;
        second = lower > higher_second ? lower : higher_second;
        best = other > best ? other : best;
      }
      const float sum = score_of_key<RowLayout>(best) + score_of_key<RowLayout>(second);
      group[c] = a_.group_score == GroupScore::Max ? best : score_key<RowLayout>(sum);
    }
    // A group is open if fewer than top_groups others are better.
    int better[columns] = {};
    const int own = layout_.thread / threads;
    for (int q = 0; q < in_column; ++q) {
      TOPN_UNROLL
      for (int c = 0; c < columns; ++c) {
        const int32_t other = RowLayout::from(q * threads, group[c]);
        if (c * in_column + q >= a_.expert_groups) continue;
        TOPN_UNROLL
        for (int d = 0; d < columns; ++d) {
          const bool before = c < d || (c == d && q < own);
          better[d] += other > group[d] || (other == group[d] && before);
        }
      }
    }
    open = 0;
    TOPN_UNROLL
    for (int d = 0; d < columns; ++d) open |= int(better[d] < a_.top_groups) << d;
  }
  // Returns whether value i of this thread is in an open group.
  __device__ __forceinline__ bool is_open(int i) const {
    return kind != Kind::Gates || (open >> i / RowLayout::chunk & 1) != 0;
  }

  // Reads the experts that a caller chose for a token; -1 stands for none.
  __device__ __forceinline__ void read_given(int64_t token) {
    if (a_.given == nullptr) return;
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      expert[j] = -1;
      if (rank(j) >= top_n_) continue;
      const int32_t given = a_.given[token * top_n_ + rank(j)];
      if (unsigned(given) < unsigned(layout_.experts)) expert[j] = given;
    }
  }

  // docs/spec.md, step 5: chooses by selection scores, unless the experts are given.
  __device__ __forceinline__ void choose(const Row& s) {
    if (!Plain && a_.given != nullptr) return look_up(s, score);
    int32_t last = std::numeric_limits<int32_t>::max();
    TOPN_UNROLL
    for (int round = 0; round < kRounds; ++round) {
      if (round > 0 && top_n_ <= 8) {
        TOPN_UNROLL
        for (int j = 0; j < Top::ranks; ++j) expert[Top::ranks + j] = 0, score[Top::ranks + j] = 0;
        break;
      }
      int32_t keys[RowLayout::count], best[Top::ranks];
      TOPN_UNROLL
      for (int i = 0; i < RowLayout::count; ++i) {
        keys[i] = keys_.pack(s[i], i);
        if ((round > 0 && keys[i] >= last) || !is_open(i)) keys[i] = kClosed;
      }
      top_.find(keys, best);
      if (kRounds > 1) last = RowLayout::from(Top::thread_of(7), best[Top::ranks - 1]);
      TOPN_UNROLL
      for (int j = 0; j < Top::ranks; ++j) {
        expert[round * Top::ranks + j] = Key::expert(best[j]);
        score[round * Top::ranks + j] = Key::score(best[j]);
      }
    }
    if constexpr (!kExact) {
      look_up(s, score);
      if (ballot(misplaced(s)) != 0) choose_exactly(s);
    }
  }

  // Looks up the values that the chosen experts have in a row.
  __device__ __forceinline__ void look_up(const Row& s, float (&values)[kRanks]) {
    TOPN_UNROLL
    for (int i = 0; i < RowLayout::count; i += 4) {
      *reinterpret_cast<float4*>(row_ + layout_.index(i)) = make_float4(s[i], s[i + 1], s[i + 2], s[i + 3]);
    }
    __syncwarp();
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) values[j] = row_[Plain || expert[j] >= 0 ? expert[j] : 0];
    __syncwarp();
  }

  // Of the current token.
  int expert[kRanks];
  float score[kRanks];  // selection scores
  int open = -1;        // a bit for each chunk of this thread: whether its group is open

 private:
  // Returns whether an expert of this thread may have a wrong rank, because others have scores with the same upper bits.
  __device__ __forceinline__ bool misplaced(const Row& s) const {
    bool wrong = false;
    TOPN_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      float next = j + 1 < kRanks ? score[j + 1] : 0.0f;
      if (j % Top::ranks + 1 == Top::ranks && RowLayout::width > 1) {
        const int round = j / Top::ranks;
        next = RowLayout::from(Top::thread_of(rank(j) + 1), score[round * Top::ranks]);
        if (round + 1 < kRounds) {
          const float first = RowLayout::from(0, score[(round + 1) * Top::ranks]);
          next = rank(j) == 7 ? first : next;
        }
      }
      wrong |= rank(j) + 1 < top_n_ && score[j] < next;
    }
    // The scores above that of the last rank that have the same key but for the index are an interval of integers.
    float least = score[0];
    TOPN_UNROLL
    for (int j = 1; j < kRanks; ++j) least = rank(j) == top_n_ - 1 ? score[j] : least;
    const int32_t bits = __float_as_int(RowLayout::from(Top::thread_of(top_n_ - 1), least));
    const unsigned first = bits >= 0 ? unsigned(bits) + 1 : unsigned(bits & ~Key::kMask);
    const unsigned count = (bits >= 0 ? ~bits : bits) & Key::kMask;
    TOPN_UNROLL
    for (int i = 0; i < RowLayout::count; ++i) wrong |= unsigned(__float_as_int(s[i])) - first < count && is_open(i);
    return wrong;
  }

  // Chooses the experts by their scores and indices, rank by rank.
  __device__ __forceinline__ void choose_exactly(const Row& s) {
    if (lane_id() == 0) count_event();
    int32_t last = std::numeric_limits<int32_t>::max();
    int after = -1;  // candidates with the last key have a larger index
    for (int k = 0; k < top_n_; ++k) {
      int32_t best = kClosed;
      int where = std::numeric_limits<int32_t>::max();
      float value = 0;
      TOPN_UNROLL
      for (int i = 0; i < RowLayout::count; ++i) {
        const int32_t key = score_key<RowLayout>(s[i]);
        const int index = layout_.index(i);
        const bool left = is_open(i) && (key < last || (key == last && index > after));
        if (left && key > best) best = key, where = index, value = s[i];
      }
      last = RowLayout::max(best);
      after = RowLayout::min(best == last ? where : std::numeric_limits<int32_t>::max());
      value = RowLayout::from(RowLayout::holder(after), value);
      TOPN_UNROLL
      for (int j = 0; j < kRanks; ++j) {
        if (rank(j) == k) expert[j] = after, score[j] = value;
      }
    }
  }

  static constexpr int32_t kClosed = std::numeric_limits<int32_t>::min();  // lower than the key of any score

  const Gate& a_;
  const RowLayout& layout_;
  Top top_;
  const Key keys_;
  float* const row_;  // in shared memory
  const int top_n_;
};

}  // namespace topn_gating::cuda
