// Items of attention: every key that a row sees is in one of them, and none is without a key that some row sees.
#include "kernels/block.h"

#include <cstdio>
#include <cstdlib>
#include <initializer_list>

using namespace cpullm;

static void check(const Attention& a) {
  const AttentionPlan p = plan_attention(a);
  const auto fail = [&](const char* what) {
    printf("%s: %lld queries, %lld keys, window %lld, %lld kv heads\n", what, (long long)a.queries, (long long)a.length,
           (long long)a.window, (long long)a.kv_heads);
    exit(1);
  };
  int64_t* const times = static_cast<int64_t*>(calloc(size_t(a.queries * a.length), sizeof(int64_t)));
  for (int64_t item = 0; item < p.items; ++item) {
    const AttentionItem at = attention_item(a, p, item);
    if (at.g != 0) continue;
    bool any = false;
    for (int64_t row = at.rows.begin; row < at.rows.end; ++row) {
      const Range seen = visible_keys(a, row);  // a head per kv head: row i is query i
      for (int64_t t = at.keys.begin; t < at.keys.end; ++t)
        if (t >= seen.begin && t < seen.end) {
          ++times[row * a.length + t];
          any = true;
        }
    }
    if (!any) fail("an item without keys");
    if (at.keys.begin % kBlockKeys) fail("an item that begins within a block");
  }
  for (int64_t i = 0; i < a.queries; ++i)
    for (int64_t t = 0; t < a.length; ++t) {
      const Range seen = visible_keys(a, i);
      if (times[i * a.length + t] != (t >= seen.begin && t < seen.end)) fail("a key that is not taken once");
    }
  free(times);
}

int main() {
  Attention a{};
  a.batch = 1;
  a.width = 64;
  for (int64_t kv_heads : {1, 4, 32})
    for (int64_t queries : {1, 3, 20})
      for (int64_t length : {20, 64, 300, 1000, 8192})
        for (int64_t window : {0, 1, 9, 64, 512, 4096, 10000}) {
          a.heads = a.kv_heads = kv_heads;
          a.queries = queries;
          a.length = length;
          a.window = window;
          check(a);
        }
  a.heads = a.kv_heads = 4;
  a.queries = 1;
  a.length = 8192;
  a.window = 512;
  const AttentionPlan windowed = plan_attention(a);
  a.length = 512;
  a.window = 0;
  printf("%lld %lld\n", (long long)windowed.items, (long long)plan_attention(a).items);
}
