// Converts arrays between storage and accumulation type. Vector code, compiled once per instruction set.

template <class T>
void widen(const T* from, acc_t<T>* to, int64_t count) {
  constexpr int n = kLanes<acc_t<T>>;
  int64_t i = 0;
  for (; i + n <= count; i += n) store(to + i, load_as<T>(from + i));
  for (; i < count; ++i) to[i] = static_cast<acc_t<T>>(from[i]);
}

template <class T>
void narrow(const acc_t<T>* from, T* to, int64_t count) {
  constexpr int n = kLanes<acc_t<T>>;
  int64_t i = 0;
  for (; i + n <= count; i += n) store_as<T>(to + i, load(from + i));
  for (; i < count; ++i) to[i] = static_cast<T>(from[i]);
}
