// Things that operators name by a number, since a call cannot hand over what C++ made of its tensors.
#pragma once

#include <memory>
#include <mutex>
#include <random>
#include <unordered_map>

namespace cpullm {

// Where numbers that Python gets begin: at a random place, and none is given twice. So a number that somebody has saved in
// another process, or of something that is gone, is an error and not something else. A fork goes on from its parent's.
inline int64_t first_number() { return 1 + int64_t(uint64_t(std::random_device()()) << 24); }

// The kept Ts of one kind. Never destroyed: their tensors must not be freed after torch is gone.
template <class T>
class Numbered {
 public:
  int64_t keep(std::shared_ptr<const T> one) {
    std::lock_guard lock(mutex_);
    kept_.emplace(next_, std::move(one));
    return next_++;
  }

  // Null where there is none.
  std::shared_ptr<const T> find(int64_t number) {
    std::lock_guard lock(mutex_);
    const auto it = kept_.find(number);
    return it == kept_.end() ? nullptr : it->second;
  }

  // Unless it was freed meanwhile.
  void replace(int64_t number, std::shared_ptr<const T> other) {
    std::lock_guard lock(mutex_);
    const auto it = kept_.find(number);
    if (it != kept_.end()) it->second.swap(other);  // whose memory is freed after the lock
  }

  void free(int64_t number) {
    std::shared_ptr<const T> last;  // its memory is freed after the lock
    std::lock_guard lock(mutex_);
    const auto it = kept_.find(number);
    if (it == kept_.end()) return;
    last = std::move(it->second);
    kept_.erase(it);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const T>> kept_;
  int64_t next_ = first_number();
};

}  // namespace cpullm
